"""Study folders, phantoms, and how they become batches."""
