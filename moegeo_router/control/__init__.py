"""The closed loop: signals say what is wrong, the policy what to do about it, interventions do and undo it."""
