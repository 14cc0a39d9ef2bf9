//! Inspects and purges the page cache from outside the server.
//!
//! The master only passes the descriptor of the shared memory. This process then attaches to the segment, as a worker
//! does. The segment stays intact even if this process dies at any instruction.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;

use forkyard_shm::{Cache, EntryInfo, Segment, Stats};
use serde_json::{Map, Value, json};

use super::client::{Connection, ControlEndpoint};
use super::commands::printed;
use super::show;
use super::wire::ControlRequest;

#[derive(Clone, Debug)]
pub(crate) enum CacheOperation {
    Stats,
    List { prefix: OsString, most: usize },
    Get { key: OsString, headers: bool },
    Purge { key: OsString },
    PurgeTag { tag: String },
    PurgePrefix { prefix: OsString },
    Clear,
}

/// Runs the operation, and writes its output to `out`.
///
/// # Errors
/// Returns a message for the operator if the master does not pass the descriptor, the page does not exist, or the
/// output cannot be written.
pub(crate) fn run(
    endpoint: &ControlEndpoint,
    operation: &CacheOperation,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), String> {
    let fd = Connection::ask(endpoint, &ControlRequest::Segment)?.descriptor()?;
    let segment = Segment::attach(fd).map_err(|error| format!("cannot use the cache: {error}"))?;
    let cache = segment.cache();
    let written = match operation {
        CacheOperation::Stats => stats(&cache.stats(), json, out),
        CacheOperation::List { prefix, most } => list(cache.list(prefix.as_bytes(), *most), json, out),
        CacheOperation::Get { key, headers } => return get(&cache, key, *headers, json, out),
        CacheOperation::Purge { key } => {
            let found = cache.purge(key.as_bytes());
            let text = if found { "purged" } else { "purged: there was no such page" };
            done(text, json!({ "purged": name(key.as_bytes()), "found": found }), json, out)
        }
        CacheOperation::PurgeTag { tag } => {
            cache.purge_tag(tag);
            done("purged all pages with this tag", json!({ "purged_tag": tag }), json, out)
        }
        CacheOperation::PurgePrefix { prefix } => {
            cache.purge_prefix(prefix.as_bytes());
            let value = json!({ "purged_prefix": name(prefix.as_bytes()) });
            done("purged all pages whose keys begin with this prefix", value, json, out)
        }
        CacheOperation::Clear => {
            cache.clear();
            done("cleared", json!({ "cleared": true }), json, out)
        }
    };
    printed(written)
}

fn done(text: &str, value: Value, json: bool, out: &mut dyn Write) -> io::Result<()> {
    if json { writeln!(out, "{value}") } else { writeln!(out, "{text}") }
}

fn stats(stats: &Stats, json: bool, out: &mut dyn Write) -> io::Result<()> {
    let numbers = [
        ("capacity", stats.capacity),
        ("used_bytes", stats.used_bytes),
        ("free_bytes", stats.free_bytes),
        ("live_bytes", stats.live_bytes),
        ("wasted_bytes", stats.wasted_bytes),
        ("entries", stats.entries),
        ("hits", stats.hits),
        ("stale_hits", stats.stale_hits),
        ("misses", stats.misses),
        ("renders", stats.renders),
        ("lease_waits", stats.lease_waits),
        ("stores", stats.stores),
        ("replaced", stats.replaced),
        ("evicted_small", stats.evicted_small),
        ("evicted_main", stats.evicted_main),
        ("evicted_index", stats.evicted_index),
        ("expired", stats.expired),
        ("purged", stats.purged),
        ("outdated", stats.outdated),
        ("refused", stats.refused),
        ("promoted", stats.promoted),
        ("reprieved", stats.reprieved),
        ("ghost_hits", stats.ghost_hits),
        ("moved_bytes", stats.moved_bytes),
        ("retries", stats.retries),
        ("lock_recoveries", stats.lock_recoveries),
        ("lock_timeouts", stats.lock_timeouts),
        ("lost", stats.lost),
        ("shards", stats.shards),
    ];
    if json {
        let object: Map<String, Value> =
            numbers.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        return writeln!(out, "{}", Value::Object(object));
    }
    numbers.iter().try_for_each(|(name, value)| writeln!(out, "{name:<16} {value}"))
}

fn list(mut pages: Vec<EntryInfo>, json: bool, out: &mut dyn Write) -> io::Result<()> {
    let ms = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    pages.sort_by(|one, other| one.key.cmp(&other.key));
    if !json {
        writeln!(out, "{:>10}  {:>8}  {:>8}  {:>4}  KEY", "BYTES", "AGE", "LEFT", "TAGS")?;
    }
    for page in pages {
        let left = page.left.map(ms);
        if json {
            let value = json!({
                "key": name(&page.key), "bytes": page.len, "age_ms": ms(page.age), "left_ms": left,
                "stale": page.stale, "tags": page.tags,
            });
            writeln!(out, "{value}")?;
        } else {
            let left = match left {
                _ if page.stale => "stale".to_owned(),
                None => "-".to_owned(),
                Some(left) => show::time(left),
            };
            let (age, key) = (show::time(ms(page.age)), page.key.escape_ascii());
            writeln!(out, "{:>10}  {age:>8}  {left:>8}  {:>4}  {key}", page.len, page.tags)?;
        }
    }
    Ok(())
}

fn get(cache: &Cache, key: &OsStr, headers: bool, json: bool, out: &mut dyn Write) -> Result<(), String> {
    let shown = name(key.as_bytes());
    let page = cache.get_page(key.as_bytes()).ok_or_else(|| format!("there is no valid page with the key {shown}"))?;
    let page = page.into_plain().map_err(|error| error.to_string())?;
    let written = if json {
        let headers: Vec<[String; 2]> = page.headers().iter().map(|(key, value)| [name(key), name(value)]).collect();
        let body = String::from_utf8_lossy(page.body());
        let value = json!({ "key": shown, "status": page.status_code(), "headers": headers, "body": body });
        writeln!(out, "{value}")
    } else {
        let mut head = || -> io::Result<()> {
            writeln!(out, "{}", page.status_code())?;
            for (key, value) in page.headers() {
                writeln!(out, "{}: {}", name(key), name(value))?;
            }
            writeln!(out)
        };
        let head = if headers { head() } else { Ok(()) };
        head.and_then(|()| out.write_all(page.body()))
    };
    printed(written)
}

/// Formats bytes as text. Valid UTF-8 is unchanged; anything else is escaped.
fn name(bytes: &[u8]) -> String {
    std::str::from_utf8(bytes).map_or_else(|_| bytes.escape_ascii().to_string(), ToOwned::to_owned)
}
