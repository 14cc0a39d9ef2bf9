//! Measures the memory of processes and their descendants as proportional set size (PSS).
//!
//! Kernel memory, such as that of sockets, is not included.

use std::fs;

use crate::cpu::pids_of_trees;
use crate::error::Error;

/// Returns the memory of these trees in bytes. A process that exits during the measurement counts as zero.
pub(crate) fn of_trees(roots: &[i32]) -> Result<u64, Error> {
    let mut bytes = 0;
    for pid in pids_of_trees(roots)? {
        match fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) {
            Ok(text) => bytes += parse(&text).unwrap_or_default(),
            Err(source) if roots.contains(&pid) => return Err(Error::Memory { pid, source }),
            Err(_) => {}
        }
    }
    Ok(bytes)
}

fn parse(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    Some(line.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_many() {
        assert_eq!(parse("5 [rollup]\nRss:   12 kB\nPss:     7 kB\nPss_Dirty: 3 kB\n"), Some(7 << 10));
        assert_eq!(parse("Rss: 12 kB\n"), None);
    }

    #[test]
    fn this_process_uses_memory() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(of_trees(&[pid]).unwrap() > 0);
    }
}
