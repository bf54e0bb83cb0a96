"""Speech: audio -> features -> prepared folders -> recognition, whole or as it is spoken."""
