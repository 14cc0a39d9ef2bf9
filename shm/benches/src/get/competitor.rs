//! Lists the competitors, and opens each of them in a process.

use std::path::PathBuf;

use crate::error::Error;
use crate::get::data::Shape;
use crate::get::lmdb::{self, Lmdb};
use crate::get::measure::Timed;
use crate::get::memcached::Memcached;
use crate::get::memory::{self, Limit};
use crate::get::ours::{self, Segments};
use crate::get::redis::Redis;

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Competitor {
    pub(crate) name: &'static str,
    pub(crate) group: Group,
}

/// A group of competitors that read the same stored values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Limit,
    Forkyard,
    Tagged,
    Quick,
    Moka,
    Lmdb,
    Apcu,
    Memcached,
    Redis,
}

pub(crate) const LIMIT: &str = "limit: HashMap, copy";

const fn row(name: &'static str, group: Group) -> Competitor {
    Competitor { name, group }
}

pub(crate) const COMPETITORS: [Competitor; 13] = [
    row(LIMIT, Group::Limit),
    row("forkyard", Group::Forkyard),
    row("forkyard, 4 tags", Group::Tagged),
    row("forkyard pin, no copy", Group::Forkyard),
    row("quick_cache, no copy", Group::Quick),
    row("quick_cache, copy", Group::Quick),
    row("moka, no copy", Group::Moka),
    row("moka, copy", Group::Moka),
    row("LMDB, no copy", Group::Lmdb),
    row("LMDB, copy", Group::Lmdb),
    row("APCu", Group::Apcu),
    row("memcached", Group::Memcached),
    row("Redis", Group::Redis),
];

impl Group {
    pub(crate) const ALL: [Group; 9] = [
        Group::Limit,
        Group::Forkyard,
        Group::Tagged,
        Group::Quick,
        Group::Moka,
        Group::Lmdb,
        Group::Apcu,
        Group::Memcached,
        Group::Redis,
    ];

    /// Returns whether each process has its own values.
    pub(crate) fn is_private(self) -> bool {
        matches!(self, Group::Limit | Group::Quick | Group::Moka)
    }

    /// Returns whether the competitor is a separate program, which must be installed.
    pub(crate) fn is_program(self) -> bool {
        matches!(self, Group::Apcu | Group::Memcached | Group::Redis)
    }

    /// Returns the rows of this group, as indices in `COMPETITORS`.
    pub(crate) fn rows(self) -> impl Iterator<Item = usize> {
        COMPETITORS.iter().enumerate().filter(move |(_, each)| each.group == self).map(|(index, _)| index)
    }
}

/// The resources that the processes share.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) shape: Shape,
    pub(crate) segments: Option<Segments>,
    pub(crate) lmdb: PathBuf,
    pub(crate) redis: Option<PathBuf>,
    pub(crate) memcached: Option<PathBuf>,
}

impl Place {
    /// Opens the stores of a group, in the order of its rows. Returns no stores for a group that the processes do not open.
    pub(crate) fn open(&self, group: Group) -> Result<Vec<Box<dyn Timed>>, Error> {
        let Place { shape, segments, lmdb, redis, memcached } = self;
        Ok(match group {
            Group::Limit => vec![Box::new(Limit::default())],
            Group::Forkyard => match segments {
                Some(Segments { plain, .. }) => {
                    vec![Box::new(ours::Copying::new(plain.clone(), 0)), Box::new(ours::Pinning::new(plain.clone()))]
                }
                None => vec![],
            },
            Group::Tagged => match segments {
                Some(Segments { tagged, .. }) => vec![Box::new(ours::Copying::new(tagged.clone(), 4))],
                None => vec![],
            },
            Group::Quick => with_and_without_copy(memory::quick(shape.keys)),
            Group::Moka => with_and_without_copy(memory::moka(shape.keys)),
            Group::Lmdb => {
                let lmdb = Lmdb::open(lmdb, *shape)?;
                vec![Box::new(lmdb.clone()), Box::new(lmdb::Copying { lmdb, found: Vec::new() })]
            }
            Group::Apcu => vec![],
            Group::Memcached => match memcached {
                Some(socket) => vec![Box::new(Memcached::connect(socket, *shape)?)],
                None => vec![],
            },
            Group::Redis => match redis {
                Some(socket) => vec![Box::new(Redis::connect(socket, *shape)?)],
                None => vec![],
            },
        })
    }
}

fn with_and_without_copy<C: memory::Shared + 'static>(cache: std::sync::Arc<C>) -> Vec<Box<dyn Timed>> {
    let copying = memory::Copying { cache: cache.clone(), found: Vec::new() };
    vec![Box::new(memory::InPlace(cache)), Box::new(copying)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::data::Data;
    use crate::get::measure::{Task, Work};
    use std::time::Duration;

    #[test]
    fn stores_in_process_keep_and_find_all_values() {
        let shape = Shape { size: 1024, keys: 2000 };
        let data = Data::new(shape, 1);
        let dir = tempfile::tempdir().unwrap();
        let segments = Some(Segments::new(shape).unwrap());
        let place = Place { shape, segments, lmdb: dir.path().to_owned(), redis: None, memcached: None };
        for group in Group::ALL {
            let mut stores = place.open(group).unwrap();
            assert!(group.is_program() || stores.len() == group.rows().count(), "{group:?}");
            if let Some(first) = stores.first_mut() {
                assert_eq!(first.fill(&data).unwrap(), 0, "{group:?}");
            }
            for store in &mut stores {
                assert_eq!(store.check(&data, usize::MAX).unwrap(), 0, "{group:?}");
            }
            // The mix is measured last, because it stores different values.
            for work in [Work::Get, Work::Mix] {
                for store in &mut stores {
                    let task = Task { work, time: Duration::from_millis(1), start: 0 };
                    let sample = store.measure(&data, task).unwrap();
                    assert!(work == Work::Mix || sample.misses == 0, "{group:?}");
                }
            }
        }
    }
}
