"""Kill parts of a real cluster at seeded random moments, and compare what is left with an undisturbed run."""
