"""Where text comes from: what every Python carries, files, the hub; cleaned, and tokenized on all cores."""
