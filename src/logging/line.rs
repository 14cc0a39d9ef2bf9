//! Formats a line of the log. Pure: the time is passed as text, and nothing is written here.
//!
//! Forkyard's own lines have the form `event key=value key="a value"`. The text format keeps this form; in JSON the pairs become
//! fields.

use std::io::Write as _;
use std::time::Duration;

use log::Level;

use super::json::Object;

/// The parts of a line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line<'a> {
    pub(crate) time: &'a str,
    pub(crate) level: Level,
    /// The process that writes the line.
    pub(crate) pid: u32,
    pub(crate) target: &'a str,
    pub(crate) message: &'a str,
    /// The line is output of an application process: `slot=S pid=P | WORDS`. The words are the application's.
    pub(crate) is_output: bool,
}

/// Placeholder for the time, which [`stamp`] overwrites.
pub(crate) const NO_TIME: &str = "0000-00-00T00:00:00.000Z";

/// Writes a time since 1970 over [`NO_TIME`]. Allocates nothing, so that a signal handler may call it.
pub(crate) fn stamp(since_1970: Duration, into: &mut [u8]) {
    let (days, second) = (since_1970.as_secs() / 86400, since_1970.as_secs() % 86400);
    // Years are counted from March, so that the leap day is the last day of a year. 400 years have 146097 days.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let millis = u64::from(since_1970.subsec_millis());
    let parts = [
        (0, 4, year),
        (5, 2, month),
        (8, 2, day),
        (11, 2, second / 3600),
        (14, 2, second / 60 % 60),
        (17, 2, second % 60),
        (20, 3, millis),
    ];
    for (at, digits, mut number) in parts {
        for place in (at..at + digits).rev() {
            if let Some(byte) = into.get_mut(place) {
                *byte = b'0' + u8::try_from(number % 10).unwrap_or(0);
            }
            number /= 10;
        }
    }
}

/// Keys that a pair must not use.
const TAKEN: [&str; 4] = ["time", "level", "target", "message"];

impl Line<'_> {
    pub(crate) fn write_text(&self, out: &mut Vec<u8>) {
        let Self { time, level, pid, message, .. } = self;
        let _ = writeln!(out, "{time} {level:<5} [{pid}] {message}"); // writing to a Vec cannot fail
    }

    /// The field `pid` is the process that the line is about: the one in its pairs, otherwise the writer.
    pub(crate) fn write_json(&self, out: &mut Vec<u8>) {
        let (ours, words) = match self.message.split_once(" | ").filter(|_| self.is_output) {
            Some((ours, words)) => (ours, Some(words)),
            None => (self.message, None),
        };
        let (event, pairs) = parse(ours);
        let level = self.level.as_str().to_ascii_lowercase();
        let mut object = Object::begin(out);
        object.text("time", self.time);
        object.text("level", &level);
        if !pairs.iter().any(|pair| pair.key == "pid") {
            object.plain("pid", self.pid);
        }
        object.text("target", self.target);
        object.text("message", words.unwrap_or(event));
        for Pair { key, value } in pairs {
            match number(&value) {
                Some(number) => object.plain(key, number),
                None => object.text(key, &value),
            }
        }
        object.end();
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Pair<'a> {
    key: &'a str,
    value: String,
}

/// Splits a message into the event, which is the text before the pairs at its end, and all pairs, each key once. If a key occurs twice,
/// the last pair counts, because Forkyard's own pairs are at the end and earlier text may come from a client.
fn parse(message: &str) -> (&str, Vec<Pair<'_>>) {
    let mut pairs: Vec<Pair<'_>> = Vec::new();
    let mut tail = None;
    let mut rest = message;
    while !rest.is_empty() {
        let at = message.len() - rest.len();
        match pair(rest) {
            Some((pair, after)) => {
                tail = tail.or(Some(at));
                pairs.retain(|other| other.key != pair.key);
                pairs.push(pair);
                rest = after;
            }
            None => {
                tail = None;
                rest = rest.split_once(' ').map_or("", |(_, rest)| rest);
            }
        }
    }
    let event = message[..tail.unwrap_or(message.len())].trim_end();
    (if event.is_empty() { message } else { event }, pairs)
}

/// The pair at the beginning of `text`, and the text after it and a space.
fn pair(text: &str) -> Option<(Pair<'_>, &str)> {
    let (key, value) = text.split_once('=')?;
    let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if !key.as_bytes().first()?.is_ascii_lowercase() || !key.bytes().all(is_name) || TAKEN.contains(&key) {
        return None;
    }
    if let Some((value, rest)) = quoted(value) {
        return Some((Pair { key, value }, rest));
    }
    let (value, rest) = value.split_once(' ').unwrap_or((value, ""));
    Some((Pair { key, value: value.to_owned() }, rest))
}

/// A value in the format of `{:?}`.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut rest = text.strip_prefix('"')?.chars();
    loop {
        match rest.next()? {
            '"' => break,
            '\\' => match rest.next()? {
                'n' => value.push('\n'),
                'r' => value.push('\r'),
                't' => value.push('\t'),
                '0' => value.push('\0'),
                'u' => {
                    let (digits, after) = rest.as_str().strip_prefix('{')?.split_once('}')?;
                    value.push(char::from_u32(u32::from_str_radix(digits, 16).ok()?)?);
                    rest = after.chars();
                }
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    let rest = rest.as_str();
    if rest.is_empty() { Some((value, rest)) } else { Some((value, rest.strip_prefix(' ')?)) }
}

/// A value that is a number in JSON, and that every JSON reader represents exactly.
fn number(value: &str) -> Option<u64> {
    let is_canonical = value == "0" || !value.starts_with(['0', '+']);
    value.parse().ok().filter(|&number| is_canonical && number < 1 << 53)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn a_time_is_stamped_as_the_logger_writes_it() {
        for (seconds, millis, text) in [
            (0, 0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, 999, "2000-02-28T23:59:59.999Z"),
            (951_782_400, 7, "2000-02-29T00:00:00.007Z"),
            (1_796_054_399, 42, "2026-11-30T15:59:59.042Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000Z"),
        ] {
            let mut line = NO_TIME.as_bytes().to_vec();
            stamp(Duration::from_secs(seconds) + Duration::from_millis(millis), &mut line);
            assert_eq!(String::from_utf8_lossy(&line), text);
        }
        stamp(Duration::from_secs(1), &mut []);
    }

    fn json(message: &str, is_output: bool) -> Value {
        let line =
            Line { time: "2026-01-02T03:04:05.678Z", level: Level::Warn, pid: 7, target: "t", message, is_output };
        let mut out = Vec::new();
        line.write_json(&mut out);
        assert_eq!(out.iter().filter(|&&byte| byte == b'\n').count(), 1);
        serde_json::from_slice(&out).unwrap()
    }

    #[test]
    fn pairs_become_fields() {
        let line = json(r#"worker died slot=3 pid=41 signal=SEGV lived=12ms in_flight="GET /a\"b\n\u{1} 3ms""#, false);
        assert_eq!(line["message"], "worker died");
        assert_eq!((&line["slot"], &line["pid"]), (&Value::from(3), &Value::from(41)));
        assert_eq!((&line["signal"], &line["lived"]), (&Value::from("SEGV"), &Value::from("12ms")));
        assert_eq!(line["in_flight"], "GET /a\"b\n\u{1} 3ms");
        assert_eq!((&line["level"], &line["target"]), (&Value::from("warn"), &Value::from("t")));
        let line = json("worker slot=3 pid=8 is not ready in time (--start-timeout): killed", false);
        assert_eq!(line["message"], "worker slot=3 pid=8 is not ready in time (--start-timeout): killed");
        assert_eq!((&line["slot"], &line["pid"]), (&Value::from(3), &Value::from(8)));
        let line = json("workers=4", false);
        assert_eq!((&line["message"], &line["workers"], &line["pid"]), (&"workers=4".into(), &4.into(), &7.into()));
    }

    #[test]
    fn what_others_say_takes_no_place_of_ours() {
        let line = json(r#"a request failed: level=x request="GET /fake" message=y x=" request="GET /""#, false);
        assert_eq!((&line["level"], &line["request"]), (&"warn".into(), &"GET /".into()));
        let line = json("slot=1 pid=2 | pid=3 level=error \u{1b}[0m \" | slot=9", true);
        assert_eq!(line["message"], "pid=3 level=error \u{1b}[0m \" | slot=9");
        assert_eq!((&line["slot"], &line["pid"], &line["level"]), (&1.into(), &2.into(), &"warn".into()));
    }

    #[test]
    fn any_message_is_one_object_with_each_key_once() {
        let pieces =
            ["a=", "\"", "\\", "=", " ", "pid=1", "x", "time=", "\n", "é", "\\u{", "}", "slot=07", "| ", "\u{7f}"];
        for seed in 0..20_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let message: String = (0..random.usize(0..12)).map(|_| pieces[random.usize(0..pieces.len())]).collect();
            let line = json(&message, random.bool());
            assert_eq!(line["time"], "2026-01-02T03:04:05.678Z", "seed {seed}");
            let (_, pairs) = parse(&message);
            let mut keys: Vec<&str> = pairs.iter().map(|pair| pair.key).collect();
            keys.sort_unstable();
            keys.dedup();
            assert_eq!(keys.len(), pairs.len(), "seed {seed}");
        }
    }

    #[test]
    fn text_is_as_it_was() {
        let line =
            Line { time: "T", level: Level::Info, pid: 7, target: "t", message: "ready slot=1", is_output: false };
        let mut out = Vec::new();
        line.write_text(&mut out);
        assert_eq!(out, b"T INFO  [7] ready slot=1\n");
    }
}
