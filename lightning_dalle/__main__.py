from lightning_dalle.cli import main

if __name__ == "__main__":
    main()
