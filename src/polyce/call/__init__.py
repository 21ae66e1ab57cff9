"""What a call is: its options, the static facts of its arrays, and every error about them."""
