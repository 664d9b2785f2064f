"""Are generated clips any good? Figures of them beside those of real and of spoilt clips."""
