"""One object for each array library, of which polyce asks all that it needs of arrays."""
