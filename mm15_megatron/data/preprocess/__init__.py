"""From the files that users have to indexed datasets: encoding, many processes, resuming, reports."""
