//! The protocol between the run and the measuring processes: one line for an order, and one line for its reply.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::error::Error;
use crate::get::measure::{Sample, Task, Work};

/// An order to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Opens the stores, and if `fill`, fills the shared stores.
    Open { fill: bool },
    /// Measures this row.
    Run { row: usize, task: Task },
}

impl Order {
    fn line(self) -> String {
        match self {
            Order::Open { fill } => format!("open {}", u8::from(fill)),
            Order::Run { row, task } => format!("run {row} {}", task_words(task)),
        }
    }

    fn parse(line: &str) -> Option<Order> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words.as_slice() {
            ["open", fill] => Some(Order::Open { fill: *fill == "1" }),
            ["run", row, work, millis, start] => {
                let work = match *work {
                    "get" => Work::Get,
                    "mix" => Work::Mix,
                    _ => return None,
                };
                let time = Duration::from_millis(millis.parse().ok()?);
                Some(Order::Run { row: row.parse().ok()?, task: Task { work, time, start: start.parse().ok()? } })
            }
            _ => None,
        }
    }
}

/// Returns a task in words. Scripts also parse these words.
pub(crate) fn task_words(Task { work, time, start }: Task) -> String {
    let work = match work {
        Work::Get => "get",
        Work::Mix => "mix",
    };
    format!("{work} {} {start}", time.as_millis())
}

fn sample_words(Sample { ns, kept, dropped, operations, misses }: Sample) -> String {
    format!("{ns} {kept} {dropped} {operations} {misses}")
}

pub(crate) fn parse_sample(words: &str) -> Option<Sample> {
    let mut words = words.split_ascii_whitespace();
    let mut next = || words.next();
    Some(Sample {
        ns: next()?.parse().ok()?,
        kept: next()?.parse().ok()?,
        dropped: next()?.parse().ok()?,
        operations: next()?.parse().ok()?,
        misses: next()?.parse().ok()?,
    })
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Talk {
    from: BufReader<File>,
    to: File,
}

impl Talk {
    pub(crate) fn new(from: impl Into<OwnedFd>, to: impl Into<OwnedFd>) -> Talk {
        Talk { from: BufReader::new(File::from(from.into())), to: File::from(to.into()) }
    }

    pub(crate) fn say(&mut self, line: &str) -> Result<(), Error> {
        let line = format!("{}\n", line.replace('\n', " "));
        self.to.write_all(line.as_bytes()).map_err(|error| Error::Worker(format!("it takes no order: {error}")))
    }

    /// Reads the next line, or returns `None` at the end.
    pub(crate) fn hear(&mut self) -> Result<Option<String>, Error> {
        let mut line = String::new();
        let length = self.from.read_line(&mut line).map_err(Error::system("reading from a pipe"))?;
        Ok((length > 0).then(|| line.trim_end().to_owned()))
    }

    // ---- the run's side ----

    pub(crate) fn order(&mut self, order: Order) -> Result<(), Error> {
        self.say(&order.line())
    }

    /// Returns the text after "ok" in a reply.
    pub(crate) fn reply(&mut self) -> Result<String, Error> {
        let line = self.hear()?.ok_or_else(|| Error::Worker("the process ended".to_owned()))?;
        match line.split_once(' ').unwrap_or((line.as_str(), "")) {
            ("ok", rest) => Ok(rest.to_owned()),
            (_, what) => Err(Error::Worker(what.to_owned())),
        }
    }

    pub(crate) fn sample(&mut self) -> Result<Sample, Error> {
        let words = self.reply()?;
        parse_sample(&words).ok_or_else(|| Error::Worker(format!("the process replied {words:?}")))
    }

    // ---- the worker's side ----

    /// Returns the next order, or `None` if there are no more orders.
    pub(crate) fn next(&mut self) -> Option<Order> {
        Order::parse(&self.hear().ok()??)
    }

    pub(crate) fn answer(&mut self, reply: Result<String, Error>) -> Result<(), Error> {
        self.say(&match reply {
            Ok(words) => format!("ok {words}"),
            Err(error) => format!("error {error}"),
        })
    }

    pub(crate) fn answer_sample(&mut self, sample: Result<Sample, Error>) -> Result<(), Error> {
        self.answer(sample.map(sample_words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::pipe;

    #[test]
    fn orders_and_replies_arrive_as_sent() {
        let (our_from, their_to) = pipe().unwrap();
        let (their_from, our_to) = pipe().unwrap();
        let (mut we, mut they) = (Talk::new(our_from, our_to), Talk::new(their_from, their_to));
        let task = Task { work: Work::Mix, time: Duration::from_millis(300), start: 77 };
        for order in [Order::Open { fill: true }, Order::Open { fill: false }, Order::Run { row: 3, task }] {
            we.order(order).unwrap();
            assert_eq!(they.next(), Some(order));
        }
        let sample = Sample { ns: 12.5, kept: 3, dropped: 1, operations: 9, misses: 2 };
        they.answer_sample(Ok(sample)).unwrap();
        assert_eq!(we.sample().unwrap(), sample);
        they.answer(Err(Error::Worker("two\nlines".into()))).unwrap();
        assert!(we.reply().unwrap_err().to_string().contains("two lines"));
        drop(we);
        assert_eq!(they.next(), None);
    }
}
