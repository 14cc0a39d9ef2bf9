//! A forked process that measures. It has its own values or its own connections, and receives orders through a pipe.

use std::collections::HashMap;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use crate::error::Error;
use crate::get::competitor::{COMPETITORS, Group, Place};
use crate::get::data::Data;
use crate::get::line::{Order, Talk};
use crate::get::measure::{Sample, Task, Timed};
use crate::get::process::{self, Child};
use crate::say;

/// Number of values to check on a server. If one client has found all values, other clients need not check all of them again.
const SPOTS: usize = 1000;

/// The worker, as seen from the run.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) talk: Talk,
    _child: Child,
}

impl Worker {
    pub(crate) fn spawn(data: &Data, place: &Place, groups: &[Group]) -> Result<Worker, Error> {
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(Error::errno("pipe"));
        let ((our_from, their_to), (their_from, our_to)) = (pipe()?, pipe()?);
        let talk = Talk::new(our_from, our_to);
        let child = process::spawn(|| {
            let stores = HashMap::new();
            Inside { data, place, groups, stores }.serve(&mut Talk::new(their_from, their_to));
        })?;
        Ok(Worker { talk, _child: child })
    }
}

/// The state of the worker process.
struct Inside<'a> {
    data: &'a Data,
    place: &'a Place,
    groups: &'a [Group],
    /// The stores, by row.
    stores: HashMap<usize, Box<dyn Timed>>,
}

impl Inside<'_> {
    fn serve(&mut self, talk: &mut Talk) {
        while let Some(order) = talk.next() {
            let answered = match order {
                Order::Open { fill } => {
                    let notes = self.open(fill);
                    talk.answer(notes)
                }
                Order::Run { row, task } => talk.answer_sample(self.run(row, task)),
            };
            if answered.is_err() {
                return;
            }
        }
    }

    /// Opens the stores. Returns the notes for the table.
    fn open(&mut self, fill: bool) -> Result<String, Error> {
        let keys = self.data.keys.len();
        let mut notes = Vec::new();
        for &group in self.groups {
            let mut stores = self.place.open(group)?;
            let name = group.rows().next().map_or("", |row| COMPETITORS[row].name);
            if let Some(first) = stores.first_mut() {
                let missing = if fill || group.is_private() {
                    say(&format!("filling: {name}"));
                    first.fill(self.data)?
                } else {
                    // Reading all values also maps the shared memory's pages into this process.
                    first.check(self.data, if group.is_program() { SPOTS } else { keys })?
                };
                if missing > 0 {
                    notes.push(format!("{name} lacks {missing} of {keys} values;"));
                }
            }
            self.stores.extend(group.rows().zip(stores));
        }
        Ok(notes.join(" "))
    }

    fn run(&mut self, row: usize, task: Task) -> Result<Sample, Error> {
        let store = self.stores.get_mut(&row).ok_or_else(|| Error::Worker(format!("row {row} is not open")))?;
        store.measure(self.data, task)
    }
}
