"""How processes share the units of a cache job: leases, the loop, launchers."""
