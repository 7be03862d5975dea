"""What a trace proves: fusion, sample axes, checkpoint segments, the head, updatable layers."""
