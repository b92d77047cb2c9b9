"""DICOM: what a folder holds, whether it makes a volume, and the volume itself.

Series are told apart by what the files say, never by their names. Nothing is repaired silently:
slices that are missing, doubled or shifted are refused; a gantry tilt is taken out, with a note.
"""
