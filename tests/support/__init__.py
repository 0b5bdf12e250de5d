"""What tests share: servers, small projects, networks, pictures; no tests here."""
