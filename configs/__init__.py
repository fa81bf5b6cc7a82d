"""One documented file for each kind of run; `common.py` holds every key."""
