//! Parses a subscriber's stream, and checks that its events arrive in order and once. Performs no I/O.

use crate::response::Malformed;

/// Maximum length of a line.
const LIMIT: usize = 4096;

/// The state of one subscriber's stream, which may arrive split at any point.
#[derive(Debug, Default)]
pub(super) struct Stream {
    /// The part of a line that has been received so far.
    rest: Vec<u8>,
    /// Whether the current event has a name. Named events are sent by the server itself and are not counted.
    is_named: bool,
    /// Whether an event has arrived.
    pub(super) is_subscribed: bool,
    /// The highest number received.
    pub(super) last: u64,
}

/// The classification of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Came {
    /// An event that was published before the measurement began.
    Early,
    /// An event that is in order. `missing` is the number of events missing before it.
    Next { missing: u64, published_ns: u64 },
    /// An event that was received twice, or out of order.
    Again,
}

impl Stream {
    /// Parses the next part of the response's body.
    pub(super) fn feed(&mut self, mut part: &[u8], came: &mut impl FnMut(Came)) -> Result<(), Malformed> {
        while let Some(end) = part.iter().position(|byte| *byte == b'\n') {
            let (line, behind) = (&part[..end], &part[end + 1..]);
            if self.rest.is_empty() {
                self.line(line, came)?;
            } else {
                let mut whole = std::mem::take(&mut self.rest);
                whole.extend_from_slice(line);
                self.line(&whole, came)?;
            }
            part = behind;
        }
        if self.rest.len() + part.len() > LIMIT {
            return Err(Malformed(format!("a line of more than {LIMIT} bytes")));
        }
        self.rest.extend_from_slice(part);
        Ok(())
    }

    fn line(&mut self, line: &[u8], came: &mut impl FnMut(Came)) -> Result<(), Malformed> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            self.is_named = false;
        } else if line.starts_with(b"event:") {
            self.is_named = true;
        } else if let Some(data) = line.strip_prefix(b"data:")
            && !self.is_named
        {
            let of_ours = || Malformed(format!("event {:?}", String::from_utf8_lossy(data)));
            let (number, published_ns) = parse(data).ok_or_else(of_ours)?;
            came(self.event(number, published_ns));
        }
        Ok(())
    }

    fn event(&mut self, number: u64, published_ns: u64) -> Came {
        self.is_subscribed = true;
        if number == 0 {
            return Came::Early;
        }
        if number <= self.last {
            return Came::Again;
        }
        let missing = number - self.last - 1;
        self.last = number;
        Came::Next { missing, published_ns }
    }
}

/// Returns the data of an event: its number, and the time of its publication.
pub(super) fn data(number: u64, published_ns: u64) -> String {
    format!("{number} {published_ns}")
}

fn parse(data: &[u8]) -> Option<(u64, u64)> {
    let (number, published_ns) = std::str::from_utf8(data).ok()?.trim_start().split_once(' ')?;
    Some((number.parse().ok()?, published_ns.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the result for a body, which must not depend on how the body is split.
    fn read(body: &str) -> (Vec<Came>, Result<(), Malformed>) {
        let in_pieces = |size: usize| {
            let (mut stream, mut came) = (Stream::default(), Vec::new());
            let fed =
                body.as_bytes().chunks(size).try_for_each(|part| stream.feed(part, &mut |event| came.push(event)));
            (came, fed)
        };
        let whole = in_pieces(body.len());
        (1..body.len()).for_each(|size| assert_eq!(in_pieces(size), whole, "in pieces of {size}"));
        whole
    }

    fn next(missing: u64, published_ns: u64) -> Came {
        Came::Next { missing, published_ns }
    }

    #[test]
    fn each_once_and_in_order() {
        let body = "retry: 2000\nid: a-1\n\nid: a-2\ndata: 0 7\n\n: hi\r\n\r\nid: a-3\r\ndata: 1 8\r\n\r\ndata:2 9\n\n";
        assert_eq!(read(body), (vec![Came::Early, next(0, 8), next(0, 9)], Ok(())));
        assert_eq!(read(&format!("data: {}\n\n", data(1, 23))).0, [next(0, 23)]);
    }

    #[test]
    fn missing_and_doubled() {
        let body = "data: 1 1\n\ndata: 4 4\n\nevent: gap\ndata: 9 news\n\ndata: 2 2\n\ndata: 4 4\n\ndata: 5 5\n\n";
        assert_eq!(read(body), (vec![next(0, 1), next(2, 4), Came::Again, Came::Again, next(0, 5)], Ok(())));
    }

    #[test]
    fn other_data_is_malformed() {
        for line in ["hello", "1", "1 2 3", "-1 2", "x 2"] {
            let (came, fed) = read(&format!("data: 1 1\n\ndata: {line}\n\n"));
            assert_eq!((came, fed.is_err()), (vec![next(0, 1)], true), "{line}");
        }
        assert!(read(&"x".repeat(LIMIT + 1)).1.is_err());
    }
}
