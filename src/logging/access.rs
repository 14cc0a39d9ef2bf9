//! Formats a line of the access log. Pure.
//!
//! Clients choose much of a line's content. Control characters, quotes and non-ASCII characters are escaped, so that
//! each entry is one line. Each field is truncated, so that no line is longer than [`LONGEST`].

use std::io::Write as _;
use std::net::IpAddr;
use std::time::Duration;

use http::{HeaderValue, Method, Version};

use super::json::Object;
use crate::config::address::Protocol;

/// Upper bound of the length of a line, in bytes.
pub(crate) const LONGEST: usize = 60 << 10;
/// Maximum length of the target, in bytes.
const TARGET: usize = 4 << 10;
/// Maximum length of every other field, in bytes.
const OTHER: usize = 1 << 10;
/// Marks a truncated field.
const CUT: &[u8] = b"...";

/// One completed request.
#[derive(Debug)]
pub(crate) struct Exchange<'a> {
    pub(crate) address: Option<IpAddr>,
    pub(crate) user: Option<&'a [u8]>,
    /// `None` if the request could not be read.
    pub(crate) request: Option<RequestFields<'a>>,
    pub(crate) status: u16,
    /// Length of the response's body.
    pub(crate) bytes: u64,
    pub(crate) took: Duration,
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) protocol: Protocol,
}

/// The logged fields of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestFields<'a> {
    pub(crate) method: &'a Method,
    pub(crate) target: &'a str,
    pub(crate) version: Version,
    pub(crate) host: Option<&'a HeaderValue>,
    pub(crate) referer: Option<&'a HeaderValue>,
    pub(crate) user_agent: Option<&'a HeaderValue>,
}

impl Exchange<'_> {
    /// Writes Apache's combined format, followed by `key=value` pairs. `time` has the form `02/Jan/2026:03:04:05 +0000`.
    pub(crate) fn write_combined(&self, time: &str, line: &mut Vec<u8>) {
        match self.address {
            Some(address) => write(line, format_args!("{address} - ")),
            None => line.extend_from_slice(b"- - "),
        }
        escaped(line, self.user.unwrap_or(b"-"), OTHER);
        write(line, format_args!(" [{time}] \""));
        if let Some(RequestFields { method, target, version, .. }) = &self.request {
            escaped(line, method.as_str().as_bytes(), OTHER);
            line.push(b' ');
            escaped(line, target.as_bytes(), TARGET);
            write(line, format_args!(" {version:?}"));
        } else {
            line.push(b'-');
        }
        write(line, format_args!("\" {} {}", self.status, self.bytes));
        let fields = self.request.as_ref();
        for value in [fields.and_then(|fields| fields.referer), fields.and_then(|fields| fields.user_agent)] {
            let value = value.map_or(&b"-"[..], HeaderValue::as_bytes);
            line.extend_from_slice(b" \"");
            escaped(line, value, OTHER);
            line.push(b'"');
        }
        let (ms, rest) = self.took_ms();
        let (slot, generation, protocol) = (self.slot, self.generation, self.protocol_name());
        write(line, format_args!(" duration_ms={ms}.{rest:03} slot={slot} gen={generation} protocol={protocol}\n"));
    }

    /// Writes a JSON object. `time` has the form `2026-01-02T03:04:05.678Z`.
    pub(crate) fn write_json(&self, time: &str, line: &mut Vec<u8>) {
        let mut object = Object::begin(line);
        object.text("time", time);
        if let Some(address) = self.address {
            object.text("client", &address.to_string());
        }
        let mut optional = |key, value: Option<&[u8]>, most| {
            if let Some(value) = value {
                object.text(key, &cut(value, most));
            }
        };
        optional("user", self.user, OTHER);
        if let Some(RequestFields { method, target, version, host, referer, user_agent }) = self.request {
            optional("method", Some(method.as_str().as_bytes()), OTHER);
            optional("target", Some(target.as_bytes()), TARGET);
            optional("version", Some(format!("{version:?}").as_bytes()), OTHER);
            optional("host", host.map(HeaderValue::as_bytes), OTHER);
            optional("referer", referer.map(HeaderValue::as_bytes), OTHER);
            optional("user_agent", user_agent.map(HeaderValue::as_bytes), OTHER);
        }
        let (ms, rest) = self.took_ms();
        object.plain("status", self.status);
        object.plain("bytes", self.bytes);
        object.plain("duration_ms", format_args!("{ms}.{rest:03}"));
        object.plain("slot", self.slot);
        object.plain("gen", self.generation);
        object.text("protocol", self.protocol_name());
        object.end();
    }

    fn took_ms(&self) -> (u128, u128) {
        let micros = self.took.as_micros();
        (micros / 1000, micros % 1000)
    }

    fn protocol_name(&self) -> &'static str {
        match self.protocol {
            Protocol::FastCgi => "fastcgi",
            Protocol::Scgi => "scgi",
            Protocol::Http => "http",
        }
    }
}

fn write(line: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    let _ = line.write_fmt(text); // writing to a Vec cannot fail
}

/// Escapes a value like Apache.
fn escaped(line: &mut Vec<u8>, value: &[u8], most: usize) {
    for &byte in value.iter().take(most) {
        match byte {
            b'"' | b'\\' => line.extend_from_slice(&[b'\\', byte]),
            b' '..=b'~' => line.push(byte),
            _ => write(line, format_args!("\\x{byte:02x}")),
        }
    }
    if value.len() > most {
        line.extend_from_slice(CUT);
    }
}

/// Replaces invalid UTF-8, and truncates the text.
fn cut(value: &[u8], most: usize) -> String {
    let mut text = String::from_utf8_lossy(value.get(..most).unwrap_or(value)).into_owned();
    if value.len() > most {
        text += "...";
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn exchange<'a>(fields: Option<RequestFields<'a>>, user: Option<&'a [u8]>) -> Exchange<'a> {
        let address = Some("192.0.2.7".parse().unwrap());
        let took = Duration::from_micros(12_034);
        let (slot, generation, protocol) = (3, 2, Protocol::FastCgi);
        Exchange { address, user, request: fields, status: 200, bytes: 42, took, slot, generation, protocol }
    }

    fn fields<'a>(target: &'a str, value: &'a HeaderValue) -> RequestFields<'a> {
        let (host, referer, user_agent) = (None, None, Some(value));
        RequestFields { method: &Method::GET, target, version: Version::HTTP_11, host, referer, user_agent }
    }

    #[test]
    fn a_line_is_what_readers_of_the_combined_format_expect() {
        let agent = HeaderValue::from_static("curl/8");
        let mut line = Vec::new();
        exchange(Some(fields("/a?b=c", &agent)), Some(b"ann")).write_combined("T", &mut line);
        let expected = "192.0.2.7 - ann [T] \"GET /a?b=c HTTP/1.1\" 200 42 \"-\" \"curl/8\" \
                        duration_ms=12.034 slot=3 gen=2 protocol=fastcgi\n";
        assert_eq!(String::from_utf8(line).unwrap(), expected);
        let mut line = Vec::new();
        Exchange { address: None, ..exchange(None, None) }.write_combined("T", &mut line);
        assert!(String::from_utf8(line).unwrap().starts_with("- - - [T] \"-\" 200 42 \"-\" \"-\" duration"));
    }

    #[test]
    fn no_client_can_break_a_line() {
        for seed in 0..2000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let long = random.bool();
            let mut bytes = |most: usize| -> Vec<u8> {
                let length = if long { most * 2 } else { random.usize(0..24) };
                let byte = |random: &mut fastrand::Rng| match random.u32(0..3) {
                    0 => b"\"\\\t\x80\xff="[random.usize(0..6)],
                    _ => random.u8(b' '..=b'~'),
                };
                (0..length).map(|_| byte(&mut random)).collect()
            };
            let agent = HeaderValue::from_bytes(&bytes(OTHER)).unwrap();
            let (user, target) = (bytes(OTHER), String::from_utf8_lossy(&bytes(TARGET)).into_owned());
            let exchange = exchange(Some(fields(&target, &agent)), Some(&user));
            let mut line = Vec::new();
            exchange.write_combined("T", &mut line);
            assert!(line.len() < LONGEST && line.is_ascii(), "seed {seed}");
            assert_eq!(line.iter().position(|byte| byte.is_ascii_control()), Some(line.len() - 1), "seed {seed}");
            let quotes = line.windows(2).filter(|pair| pair[1] == b'"' && pair[0] != b'\\').count();
            let escaped = line.windows(3).filter(|three| three == b"\\\\\"").count();
            assert!(quotes <= 6 && quotes + escaped >= 6, "seed {seed}: {}", String::from_utf8_lossy(&line));
            let mut line = Vec::new();
            exchange.write_json("T", &mut line);
            let object: Value = serde_json::from_slice(&line).unwrap();
            assert!(line.len() < LONGEST, "seed {seed}");
            assert_eq!((&object["status"], &object["duration_ms"]), (&200.into(), &12.034.into()));
            if target.len() <= TARGET {
                assert_eq!(object["target"], target, "seed {seed}");
            }
        }
    }
}
