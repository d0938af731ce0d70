"""Only our pool's child process."""
