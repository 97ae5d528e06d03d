"""Plans, programs and choices as pictures: one file for each view."""
