"""One study, one grid: enumeration (grid), identity, records, completion (complete), tuning (tune). No torch."""
