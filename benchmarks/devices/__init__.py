"""Training in several processes: alike one process (``alike``), and after one of them was killed (``kills``)."""
