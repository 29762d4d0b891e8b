"""Files and mappings: how they are opened, mapped, written whole and recognised."""
