"""Raw scans to study folders: reading, registration, masks, quality control."""
