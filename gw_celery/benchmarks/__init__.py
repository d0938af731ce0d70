"""What one replica does in a second, in workload: measured, kept, and corrected by traffic."""
