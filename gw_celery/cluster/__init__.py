"""The exchange of workers over Redis, in their parent processes."""
