"""From a trained model to a champion: register, judge, promote, roll back; the audit record."""
