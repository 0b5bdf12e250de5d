"""Which requests get in and when: what each costs in bytes, lanes that wait in lines of their own, limits of each client."""
