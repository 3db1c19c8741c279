"""From a teacher alone to a student that ships: widths, repair, training, and the student as source code."""
