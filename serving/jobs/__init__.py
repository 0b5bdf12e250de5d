"""Work that is asked for now and fetched later: a store on disk, what runs it, and its routes."""
