"""One walk from pure noise to a clean volume per file, all with one signature."""
