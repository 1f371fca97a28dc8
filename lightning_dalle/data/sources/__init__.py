"""Sources of captioned images and of encoded images."""
