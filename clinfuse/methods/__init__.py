"""Fusion methods behind one interface, ours and every baseline alike."""
