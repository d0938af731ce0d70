"""The data that crosses between processes: headers, frames, the snapshot, worker records."""
