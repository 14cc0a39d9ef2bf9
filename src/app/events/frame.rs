//! Encodes events as lines of `text/event-stream` (HTML standard, 9.2.5). Pure: bytes in, bytes
//! out.
//!
//! No name or data can break out of its field, because lines are split exactly where a browser splits them.

use std::fmt::Write as _;

use bytes::{BufMut as _, Bytes, BytesMut};

use super::cursor::Cursor;

/// A comment, which browsers ignore and which keeps the connection from looking idle.
pub(super) const COMMENT: &[u8] = b":\n\n";

/// An encoded event: its id, and the remaining lines, which are encoded once for all receivers.
#[derive(Debug)]
pub(super) struct Frame {
    bytes: Bytes,
    /// Offset of the end of the id.
    rest: usize,
}

impl Frame {
    pub(super) fn new(id: &Cursor, name: &str, data: &[u8]) -> Self {
        let mut bytes = BytesMut::with_capacity(name.len() + data.len() + 64);
        put_id(&mut bytes, id);
        let rest = bytes.len();
        put_event(&mut bytes, name, data);
        Self { bytes: bytes.freeze(), rest }
    }

    /// Returns the frame for a subscriber to this topic only.
    pub(super) fn whole(&self) -> Bytes {
        self.bytes.clone()
    }

    /// Returns the frame for a subscriber to several topics, which carries the given id.
    pub(super) fn with_id(&self, id: &Cursor) -> Bytes {
        let mut bytes = BytesMut::with_capacity(self.bytes.len() + 21 * id.ids.len());
        put_id(&mut bytes, id);
        bytes.put_slice(&self.bytes[self.rest..]);
        bytes.freeze()
    }
}

/// Writes the id of the event that the next empty line ends. If no event precedes the empty line, the id only updates
/// the client's position.
pub(super) fn put_id(bytes: &mut BytesMut, id: &Cursor) {
    put_fmt(bytes, format_args!("id: {id}\n"));
}

/// Writes the time that the client must wait before it reconnects.
pub(super) fn put_retry(bytes: &mut BytesMut, ms: u64) {
    put_fmt(bytes, format_args!("retry: {ms}\n"));
}

/// Writes an event without its id.
pub(super) fn put_event(bytes: &mut BytesMut, name: &str, data: &[u8]) {
    // The publisher may be a program in any language, so the name is not trusted.
    let name = name.split(['\r', '\n', '\0']).next().unwrap_or_default();
    if !name.is_empty() {
        put_fmt(bytes, format_args!("event: {name}\n"));
    }
    let mut rest = data;
    loop {
        let end = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n'));
        let (line, after) = rest.split_at(end.unwrap_or(rest.len()));
        bytes.put_slice(b"data: ");
        bytes.put_slice(line);
        bytes.put_u8(b'\n');
        let Some(_) = end else { break };
        rest = after.strip_prefix(b"\r\n").unwrap_or(&after[1..]);
    }
    bytes.put_u8(b'\n');
}

fn put_fmt(bytes: &mut BytesMut, text: std::fmt::Arguments<'_>) {
    let _ = bytes.write_fmt(text); // a growing buffer accepts every write
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses a stream as a browser does (HTML standard, 9.2.6). Returns the dispatched events,
    /// each with its type, its data and the last event id, and then the last event id at the end.
    fn browser(stream: &[u8]) -> (Vec<(String, String, String)>, String) {
        let text = String::from_utf8_lossy(stream).replace("\r\n", "\n").replace('\r', "\n");
        let (mut events, mut last_id) = (Vec::new(), String::new());
        let (mut id, mut name, mut data) = (String::new(), String::new(), String::new());
        for line in text.split_terminator('\n') {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "" if line.is_empty() => {
                    last_id.clone_from(&id);
                    if !data.is_empty() {
                        data.pop();
                        events.push((std::mem::take(&mut name), std::mem::take(&mut data), id.clone()));
                    }
                    name.clear();
                }
                "event" => value.clone_into(&mut name),
                "data" => data.extend([value, "\n"]),
                "id" if !value.contains('\0') => value.clone_into(&mut id),
                _ => {}
            }
        }
        (events, last_id)
    }

    #[test]
    fn a_browser_gets_what_was_published_and_nothing_beside() {
        let id = Cursor { epoch: 0xabcd, ids: vec![5] };
        for (data, seen) in [
            ("", ""),
            ("one", "one"),
            (" two words ", " two words "),
            ("a\nb", "a\nb"),
            ("a\r\nb\rc\n", "a\nb\nc\n"),
            ("\r\n\r\nid: 7\n\nevent: x\ndata: y\n\n", "\n\nid: 7\n\nevent: x\ndata: y\n\n"),
            (": no comment", ": no comment"),
            ("é\u{2028}\0", "é\u{2028}\0"),
        ] {
            for (name, type_seen) in [("", ""), ("price", "price"), ("x\ndata: forged\n\n", "x"), ("\revil", "")] {
                let (events, last) = browser(&Frame::new(&id, name, data.as_bytes()).whole());
                assert_eq!(
                    events,
                    [(type_seen.to_owned(), seen.to_owned(), "0000abcd-5".to_owned())],
                    "{name:?} {data:?}"
                );
                assert_eq!(last, "0000abcd-5");
            }
        }
    }

    #[test]
    fn any_bytes_stay_one_event() {
        let mut random = fastrand::Rng::with_seed(11);
        for round in 0..2000 {
            let some = |random: &mut fastrand::Rng, most| -> Vec<u8> {
                let alphabet = b"\r\n\0: adeintvx\xff\xc3\xa9";
                (0..random.usize(0..most)).map(|_| alphabet[random.usize(0..alphabet.len())]).collect()
            };
            let name = String::from_utf8_lossy(&some(&mut random, 12)).into_owned();
            let data = some(&mut random, 40);
            let id = Cursor { epoch: round, ids: vec![u64::from(round), 3] };
            let frame = Frame::new(&Cursor { epoch: round, ids: vec![9] }, &name, &data);
            let (events, _) = browser(&frame.with_id(&id));
            assert_eq!(events.len(), 1, "round {round}: {name:?} {data:?}");
            let sent = String::from_utf8_lossy(&data).replace("\r\n", "\n").replace('\r', "\n");
            assert_eq!((&events[0].1, &events[0].2), (&sent, &id.to_string()), "round {round}: {name:?} {data:?}");
        }
    }

    #[test]
    fn an_id_alone_is_no_event_but_is_remembered() {
        let mut bytes = BytesMut::new();
        put_retry(&mut bytes, 1500);
        put_id(&mut bytes, &Cursor { epoch: 1, ids: vec![2, 3] });
        bytes.extend_from_slice(b"\n");
        bytes.extend_from_slice(COMMENT);
        assert_eq!(browser(&bytes), (Vec::new(), "00000001-2.3".to_owned()));
    }
}
