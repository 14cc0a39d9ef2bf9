//! Adopts a segment that outlives the master that created it. Such a segment was either passed to the program that replaces the master, or
//! kept by another process (systemd's file descriptor store).
//!
//! Must not use a segment unless this build would have created it for the same plan, or for a plan with more rows.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, fcntl};

use crate::Plan;
use crate::memory::error::SegmentError;
use crate::memory::geometry::Geometry;
use crate::segment::{self, Segment, system};

impl Segment {
    /// Attaches to the segment of a former master whose workers may still be using it. The segment must be what `plan` would create; it may
    /// also have more scoreboard rows.
    ///
    /// A segment in a file can be [closed](Segment::close) by the process that adopts it.
    ///
    /// # Errors
    /// Fails in the same cases as [`Segment::attach`], and if the segment does not fit the plan.
    pub fn adopt(fd: OwnedFd, plan: &Plan) -> Result<Segment, SegmentError> {
        Geometry::of(plan)?;
        // Only a memory file has seals.
        let file = fcntl(&fd, FcntlArg::F_GET_SEALS).is_err();
        let file = file.then(|| fd.try_clone().map(File::from).map(Arc::new)).transpose();
        let file = file.map_err(|error| system("duplicate a descriptor", error))?;
        let mut segment = Segment::attach(fd)?;
        let found = segment.inner.header().map(segment::plan_of).ok_or(segment::BAD_GEOMETRY)?;
        if let Some(why) = segment::misfit(&found, &Plan { rows: plan.rows.min(found.rows), ..*plan }) {
            return Err(SegmentError::Unusable { why });
        }
        if found.rows < plan.rows {
            return Err(SegmentError::TooFewRows { rows: found.rows, asked: plan.rows });
        }
        if let Some(inner) = Arc::get_mut(&mut segment.inner) {
            inner.file = file;
        }
        Ok(segment)
    }

    /// Like [`Segment::adopt`], for a segment whose former users have all exited. Everything they held is released, the rows of the
    /// scoreboard are emptied, and the cache is audited.
    ///
    /// # Errors
    /// Fails in the same cases as [`Segment::adopt`], and if the cache is inconsistent.
    pub fn adopt_alone(fd: OwnedFd, plan: &Plan) -> Result<Segment, SegmentError> {
        let segment = Segment::adopt(fd, plan)?;
        segment.inner.bury_the_dead();
        segment.scoreboard().reset();
        match segment.cache().audit() {
            Ok(_) => Ok(segment),
            Err(_) => Err(SegmentError::Unusable { why: "its cache contradicts itself" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan { cache_bytes: 512 * 1024, rows: 3, max_entry: 0, events_bytes: 64 * 1024 };

    #[test]
    fn it_is_adopted_with_its_pages_if_the_plan_is_the_same() {
        let made = Segment::create(&PLAN).unwrap();
        made.cache().set("k", "v", &crate::StoreOptions::new()).unwrap();
        made.scoreboard().claim(1, 77, 5).unwrap().set_state(crate::State::Ready);
        let fd = || made.fd().try_clone_to_owned().unwrap();
        for (other, what) in [
            (Plan { rows: 4, ..PLAN }, "scoreboard"),
            (Plan { cache_bytes: 1 << 20, ..PLAN }, "page cache"),
            (Plan { cache_bytes: 1 << 20, rows: 4, events_bytes: 1 << 20, ..PLAN }, "page cache"),
            (Plan { max_entry: 4096, ..PLAN }, "largest page"),
            (Plan { events_bytes: 1 << 20, ..PLAN }, "event log"),
            (Plan { events_bytes: 0, ..PLAN }, "event log"),
        ] {
            let refused = Segment::adopt(fd(), &other).unwrap_err();
            assert!(refused.to_string().contains(what), "{refused}");
        }
        let adopted = Segment::adopt(fd(), &Plan { rows: 2, ..PLAN }).unwrap();
        assert_eq!(adopted.scoreboard().rows(), 3, "more than are wanted");
        assert_eq!(adopted.cache().get("k").unwrap(), b"v");
        assert_eq!(adopted.scoreboard().read(1).unwrap().pid, 77, "its workers live on");
        let alone = Segment::adopt_alone(fd(), &PLAN).unwrap();
        assert_eq!(alone.cache().get("k").unwrap(), b"v");
        assert_eq!(alone.scoreboard().read(1).unwrap().pid, 0, "its workers are gone");
    }

    #[test]
    fn who_adopts_a_file_may_close_it() {
        let _nobody_forks = crate::segment::file::tests::nobody_forks();
        let path = std::env::temp_dir().join(format!("forkyard-adopt-{}", std::process::id()));
        let (made, _) = Segment::open(&path, &PLAN).unwrap();
        made.cache().set("k", "v", &crate::StoreOptions::new()).unwrap();
        let adopted = Segment::adopt(made.fd().try_clone_to_owned().unwrap(), &PLAN).unwrap();
        drop(made);
        adopted.close().unwrap();
        let (again, found) = Segment::open(&path, &PLAN).unwrap();
        std::fs::remove_file(path).unwrap();
        assert_eq!((found, again.cache().get("k")), (crate::Found::Warm, Some(b"v".to_vec())));
    }
}
