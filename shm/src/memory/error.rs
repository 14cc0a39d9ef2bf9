//! The reasons why a segment cannot be used.

use std::io;

use super::memory_limit;

/// Why a segment could not be created or attached.
#[derive(Debug)]
#[non_exhaustive]
pub enum SegmentError {
    /// The requested cache is too small to be useful.
    CacheTooSmall {
        /// Requested size in bytes.
        asked: u64,
        /// The minimum size in bytes.
        least: u64,
    },
    /// The requested event log is too small to be useful.
    LogTooSmall {
        /// Requested size in bytes.
        asked: u64,
        /// The minimum size in bytes.
        least: u64,
    },
    /// More scoreboard rows were requested than a segment can have.
    TooManyRows {
        /// Requested number of rows.
        asked: u32,
        /// The maximum number of rows.
        most: u32,
    },
    /// An existing segment has fewer scoreboard rows than the plan requests.
    TooFewRows {
        /// Number of rows in the segment.
        rows: u32,
        /// Requested number of rows.
        asked: u32,
    },
    /// The requested maximum entry does not fit into a shard of the cache.
    EntryTooLarge {
        /// Requested size in bytes.
        asked: u64,
        /// The maximum for a cache of this size, in bytes.
        most: u64,
    },
    /// A table of claims was requested for a number that is 0 or too large.
    ClaimsOutOfRange {
        /// What the number counts.
        what: &'static str,
        /// Requested number.
        asked: u32,
        /// The maximum.
        most: u32,
    },
    /// The machine does not have enough memory.
    NoMemory {
        /// Size of the whole segment in bytes.
        bytes: u64,
        /// Memory available on the machine in bytes, if known.
        available: Option<u64>,
        /// The error from the kernel.
        source: io::Error,
    },
    /// The file system does not have enough free space for the segment's file.
    NoSpace {
        /// Size of the whole segment in bytes.
        bytes: u64,
        /// Free space in the file system in bytes, if known.
        free: Option<u64>,
        /// The error from the kernel.
        source: io::Error,
    },
    /// The segment does not fit into what remains of a control group's memory limit (for a container or a systemd unit). The kernel would
    /// grant the memory, but would kill a process later.
    OverLimit {
        /// Size of the whole segment in bytes.
        bytes: u64,
        /// The group's memory limit in bytes.
        limit: u64,
        /// The remainder of the group's limit in bytes.
        free: u64,
    },
    /// The segment exceeds the size limit for files that this process creates, so the kernel would send SIGXFSZ.
    OverFileSize {
        /// Size of the whole segment in bytes.
        bytes: u64,
        /// The limit (`ulimit -f`) in bytes.
        limit: u64,
    },
    /// A system call failed.
    System {
        /// The operation that failed.
        tried: &'static str,
        /// The error from the kernel.
        source: io::Error,
    },
    /// The descriptor passed to `attach` is not a segment, or is not a segment that this build can use.
    Unusable {
        /// What is wrong with the descriptor.
        why: &'static str,
    },
}

/// A size in MiB, for messages.
struct Mebibytes(u64);

impl std::fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const MEBIBYTE: u64 = 1 << 20;
        let tenths = u128::from(self.0) * 10 / u128::from(MEBIBYTE);
        if tenths % 10 == 0 {
            write!(f, "{} MiB", tenths / 10)
        } else {
            write!(f, "{}.{} MiB", tenths / 10, tenths % 10)
        }
    }
}

impl SegmentError {
    pub(crate) fn no_memory(bytes: u64, source: io::Error) -> SegmentError {
        SegmentError::NoMemory { bytes, available: memory_limit::available_in_machine(), source }
    }
}

impl std::fmt::Display for SegmentError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::CacheTooSmall { asked, least } => write!(
                f,
                "cannot make a page cache of {asked} bytes: the least is {least} (ask for more, or for 0 to have none)"
            ),
            Self::LogTooSmall { asked, least } => write!(
                f,
                "cannot make an event log of {asked} bytes: the least is {least} (ask for more, or for 0 to have none)"
            ),
            Self::TooManyRows { asked, most } => {
                write!(f, "cannot make a scoreboard of {asked} rows: the most is {most} (ask for fewer processes)")
            }
            Self::TooFewRows { rows, asked } => {
                write!(f, "the scoreboard has {rows} rows, and {asked} are asked for (ask for fewer processes)")
            }
            Self::EntryTooLarge { asked, most } => write!(
                f,
                "cannot keep entries of {asked} bytes in a page cache of this size: the most is {most} (ask for smaller \
                 entries, or for a larger cache)"
            ),
            Self::ClaimsOutOfRange { what, asked, most } => {
                write!(f, "cannot make a table for {asked} {what}: ask for 1 to {most}")
            }
            Self::NoMemory { bytes, available, source } => {
                write!(f, "cannot reserve {} of shared memory: {source}", Mebibytes(*bytes))?;
                available.map_or(Ok(()), |bytes| write!(f, ", the machine has {} available", Mebibytes(bytes)))
            }
            Self::NoSpace { bytes, free, source } => {
                write!(f, "cannot reserve {} for the cache file: {source}", Mebibytes(*bytes))?;
                free.map_or(Ok(()), |bytes| write!(f, ", its file system has {} free", Mebibytes(bytes)))
            }
            Self::OverLimit { bytes, limit, free } => write!(
                f,
                "cannot reserve {} of shared memory: the memory limit of this container or unit is {}, of which {} are free \
                 (ask for a smaller page cache, or raise the limit)",
                Mebibytes(*bytes),
                Mebibytes(*limit),
                Mebibytes(*free)
            ),
            Self::OverFileSize { bytes, limit } => write!(
                f,
                "cannot reserve {} of shared memory: files of this process may have {} (raise ulimit -f, or LimitFSIZE= in \
                 the unit)",
                Mebibytes(*bytes),
                Mebibytes(*limit)
            ),
            Self::System { tried, source } => write!(f, "cannot {tried}: {source}"),
            Self::Unusable { why } => {
                write!(f, "cannot attach to the shared segment: {why} (start with a new one)")
            }
        }
    }
}

impl std::error::Error for SegmentError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NoMemory { source, .. } | Self::NoSpace { source, .. } | Self::System { source, .. } => Some(source),
            Self::CacheTooSmall { .. }
            | Self::LogTooSmall { .. }
            | Self::TooManyRows { .. }
            | Self::TooFewRows { .. }
            | Self::EntryTooLarge { .. }
            | Self::ClaimsOutOfRange { .. }
            | Self::OverLimit { .. }
            | Self::OverFileSize { .. }
            | Self::Unusable { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_what_to_do() {
        let small = SegmentError::CacheTooSmall { asked: 5, least: 262_144 };
        assert_eq!(
            small.to_string(),
            "cannot make a page cache of 5 bytes: the least is 262144 (ask for more, or for 0 to have none)"
        );
        let over = SegmentError::OverLimit { bytes: 65 << 20, limit: 60 << 20, free: (58 << 20) + (1 << 19) };
        assert_eq!(
            over.to_string(),
            "cannot reserve 65 MiB of shared memory: the memory limit of this container or unit is 60 MiB, of which 58.5 MiB \
             are free (ask for a smaller page cache, or raise the limit)"
        );
    }
}
