"""The armed model: its own calls sent to ``trady.ops``, compact parameters beside its weights."""
