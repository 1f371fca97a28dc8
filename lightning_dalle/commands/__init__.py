"""The commands beside Lightning's verbs. Each imports torch only inside its function, so that `--help` and a user's
mistake are answered at once.
"""
