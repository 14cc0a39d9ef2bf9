//! Records which app processes this gateway uses, and when they last answered.
//!
//! With more than one request at a time in a process, this distinguishes a slow request from a process that hangs, and
//! the request that has killed a process from those that died with it.

use std::cell::RefCell;
use std::collections::BTreeMap;

use tokio::time::Instant;

/// The activity of the app processes, by slot.
#[derive(Debug, Default)]
pub(super) struct Activity(RefCell<BTreeMap<u32, Process>>);

#[derive(Debug)]
struct Process {
    pid: i32,
    /// Number of attempts that this gateway makes.
    attempts: u32,
    answered: Option<Instant>,
}

/// An attempt, until it is dropped.
#[derive(Debug)]
pub(super) struct InUse<'a> {
    activity: &'a Activity,
    slot: u32,
    pid: i32,
}

impl Activity {
    /// Records an attempt.
    pub(super) fn begin(&self, slot: u32, pid: i32) -> InUse<'_> {
        let mut processes = self.0.borrow_mut();
        let process = processes.entry(slot).or_insert(Process { pid, attempts: 0, answered: None });
        if process.pid != pid {
            *process = Process { pid, attempts: 0, answered: None };
        }
        process.attempts += 1;
        InUse { activity: self, slot, pid }
    }

    /// Records that the process has sent a part of a response.
    pub(super) fn answered(&self, slot: u32, pid: i32) {
        if let Some(process) = self.0.borrow_mut().get_mut(&slot).filter(|process| process.pid == pid) {
            process.answered = Some(Instant::now());
        }
    }

    /// Whether the process has sent a part of a response since then.
    pub(super) fn has_answered(&self, slot: u32, pid: i32, since: Instant) -> bool {
        let processes = self.0.borrow();
        processes.get(&slot).is_some_and(|process| process.pid == pid && process.answered.is_some_and(|at| at > since))
    }
}

impl InUse<'_> {
    /// Whether this gateway makes no other attempt with the process.
    pub(super) fn is_alone(&self) -> bool {
        let processes = self.activity.0.borrow();
        processes.get(&self.slot).is_none_or(|process| process.pid != self.pid || process.attempts <= 1)
    }
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        let mut processes = self.activity.0.borrow_mut();
        if let Some(process) = processes.get_mut(&self.slot).filter(|process| process.pid == self.pid) {
            process.attempts -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn attempts_are_counted_for_each_process() {
        let activity = Activity::default();
        let first = activity.begin(0, 10);
        assert!(first.is_alone());
        let second = activity.begin(0, 10);
        let other = activity.begin(1, 11);
        assert!(!first.is_alone() && !second.is_alone() && other.is_alone());
        drop(first);
        assert!(second.is_alone());
        let successor = activity.begin(0, 12);
        drop(second); // belongs to the former process
        assert!(successor.is_alone());
    }

    #[test]
    fn an_answer_counts_for_its_process_only() {
        let activity = Activity::default();
        let before = Instant::now().checked_sub(Duration::from_millis(1)).unwrap();
        let _first = activity.begin(0, 10);
        assert!(!activity.has_answered(0, 10, before));
        activity.answered(0, 10);
        assert!(activity.has_answered(0, 10, before) && !activity.has_answered(0, 11, before));
        assert!(!activity.has_answered(0, 10, Instant::now() + Duration::from_secs(1)));
    }
}
