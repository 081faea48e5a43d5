"""What is done on the host: files, the Hugging Face hub, the terminal, modules of users."""
