"""kombu's Redis transport with our additions, and the search for the project's Redis."""
