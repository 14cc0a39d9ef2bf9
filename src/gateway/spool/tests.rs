//! Tests of the queue with its files: random histories, wake-ups, broken bodies, and full file systems.

use std::future::poll_fn;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::Wake;

use http_body::Body as _;
use http_body_util::BodyExt as _;

use super::*;

const KIB: u64 = 1 << 10;

fn context() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

fn limits(directory: &Path, memory_each: u64, file_each: u64) -> SpoolLimits {
    SpoolLimits { memory_each, file_each, directory: directory.into() }
}

/// The content of all bodies repeats after this number of bytes.
const PERIOD: u64 = 200_003;
static CONTENT: LazyLock<Bytes> = LazyLock::new(|| {
    (0..2 * PERIOD).map(|at| at % PERIOD).map(|at| (at ^ at >> 8 ^ at >> 16).to_le_bytes()[0]).collect()
});

/// Returns the bytes of a body from `offset`, at most one period.
fn bytes(offset: u64, length: u64) -> Bytes {
    let start = usize::try_from(offset % PERIOD).unwrap();
    CONTENT.slice(start..start + usize::try_from(length).unwrap())
}

/// Reads until nothing more is ready, compares the bytes, and returns their number and the result of the last read.
fn drain(reader: &mut SpoolReader, offset: u64) -> (u64, Poll<Option<SpoolError>>) {
    let mut count = 0;
    loop {
        match reader.poll_data(&context()) {
            Poll::Ready(Some(Ok(read))) => {
                assert!(read == bytes(offset + count, read.len() as u64), "wrong bytes after {}", offset + count);
                count += read.len() as u64;
            }
            Poll::Ready(Some(Err(error))) => return (count, Poll::Ready(Some(error))),
            Poll::Ready(None) => return (count, Poll::Ready(None)),
            Poll::Pending => return (count, Poll::Pending),
        }
    }
}

fn push_until_full(writer: &mut SpoolWriter, chunk: u64) {
    while !writer.is_full() {
        writer.push(bytes(writer.len_written(), chunk)).unwrap();
    }
}

/// A spool and what its reader must receive.
struct Modelled {
    writer: Option<SpoolWriter>,
    reader: Option<SpoolReader>,
    limits: SpoolLimits,
    written: u64,
    read: u64,
    is_whole: bool,
    /// Whether the writer pushes into a full spool.
    is_impatient: bool,
}

const MAX_CHUNK: u64 = 100 * KIB;

impl Modelled {
    fn new(random: &mut fastrand::Rng, directory: &Path, budget: &SpoolBudget) -> Self {
        let file_each = *random.choice(&[0, 50 * KIB, 2000 * KIB, u64::MAX]).unwrap();
        let limits = limits(directory, random.u64(0..100 * KIB), file_each);
        let (writer, reader) = spool(&limits, budget);
        let is_impatient = random.u8(..) < 50;
        Self { writer: Some(writer), reader: Some(reader), limits, written: 0, read: 0, is_whole: false, is_impatient }
    }

    fn step(&mut self, random: &mut fastrand::Rng) {
        match random.u32(0..1000) {
            0..600 => self.push(random),
            600..960 => self.read(),
            960..970 => self.reader = None,
            970..980 => self.writer = None,
            980..990 => {
                if let Some(writer) = self.writer.take() {
                    self.is_whole = true;
                    writer.finish(None);
                }
            }
            _ => {
                if let Some(writer) = self.writer.take() {
                    writer.abort(SpoolError::TooLong { limit: 7 });
                }
            }
        }
    }

    fn push(&mut self, random: &mut fastrand::Rng) {
        let Some(writer) = &mut self.writer else { return };
        let is_ready = writer.poll_ready(&context()).is_ready();
        assert_eq!(is_ready, !writer.is_full());
        if !is_ready && !self.is_impatient {
            return;
        }
        let longest = *random.choice(&[10, 1000, 20_000, MAX_CHUNK]).unwrap();
        let chunk = bytes(self.written, random.u64(0..=longest));
        let length = chunk.len() as u64;
        match writer.push(chunk) {
            Ok(()) if self.reader.is_some() => self.written += length,
            Ok(()) => {}
            Err(_) => {
                assert!(!is_ready, "a spool that is not full must accept a chunk");
                self.writer.take().unwrap().finish(None); // must not make the body whole
            }
        }
    }

    fn read(&mut self) {
        let Some(reader) = &mut self.reader else { return };
        match reader.poll_data(&context()) {
            Poll::Ready(Some(Ok(read))) => {
                assert!(read == bytes(self.read, read.len() as u64), "wrong bytes after {}", self.read);
                self.read += read.len() as u64;
            }
            Poll::Ready(None) => assert!(self.is_whole && self.read == self.written),
            Poll::Ready(Some(Err(_))) => assert!(self.writer.is_none() && !self.is_whole && self.read == self.written),
            Poll::Pending => assert!(self.writer.is_some() && self.read == self.written),
        }
    }

    fn check(&self) {
        let Some(reader) = &self.reader else { return };
        let shared = lock(&reader.0);
        let (memory, file) = shared.store.held();
        assert!(memory <= self.limits.memory_each + MAX_CHUNK, "{memory} bytes in memory, {:?}", self.limits);
        assert!(file <= self.limits.file_each, "{file} bytes in a file, {:?}", self.limits);
        assert!(memory + file >= shared.store.len());
        assert_eq!(shared.store.len(), self.written - self.read);
        assert_eq!(shared.store.has_file(), file > 0);
    }
}

fn history(seed: u64, directory: &Path) {
    let mut random = fastrand::Rng::with_seed(seed);
    let (memory, files) = (random.u64(0..300 * KIB), random.u64(0..5000 * KIB));
    let budget = SpoolBudget::new(memory, files);
    let count = random.u64(1..6);
    let mut spools: Vec<_> = (0..count).map(|_| Modelled::new(&mut random, directory, &budget)).collect();
    for _ in 0..300 {
        let spool = random.choice(&mut spools).unwrap();
        spool.step(&mut random);
        spool.check();
        assert!(budget.memory_used() <= memory + (count + 1) * MAX_CHUNK);
        assert!(budget.files_used() <= files);
    }
    for mut spool in spools {
        drop(spool.writer.take());
        if let Some(mut reader) = spool.reader.take() {
            let (count, end) = drain(&mut reader, spool.read);
            assert_eq!(spool.read + count, spool.written);
            assert_eq!(matches!(end, Poll::Ready(None)), spool.is_whole);
        }
    }
    assert_eq!((budget.memory_used(), budget.files_used()), (0, 0));
}

#[test]
fn random_histories_keep_every_byte_and_every_limit() {
    let directory = tempfile::tempdir().unwrap();
    let first = fastrand::u64(..);
    for seed in (0..1000).map(|number| first.wrapping_add(number)) {
        if let Err(panic) = std::panic::catch_unwind(|| history(seed, directory.path())) {
            std::panic::panic_any(format!("seed {seed}: {:?}", panic.downcast_ref::<String>()));
        }
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_small_body_uses_no_file_and_a_reader_that_caught_up_reads_from_memory_again() {
    let directory = tempfile::tempdir().unwrap();
    let budget = SpoolBudget::new(KIB * KIB, KIB * KIB);
    let (mut writer, mut reader) = spool(&limits(directory.path(), 10 * KIB, 500 * KIB), &budget);
    writer.push(bytes(0, 10 * KIB)).unwrap();
    assert_eq!((budget.memory_used(), budget.files_used()), (10 * KIB, 0));
    writer.push(bytes(10 * KIB, 1)).unwrap();
    assert_eq!((budget.memory_used(), budget.files_used()), (1, 10 * KIB));
    assert_eq!((writer.len_written(), writer.len_buffered()), (10 * KIB + 1, 10 * KIB + 1));
    let (count, _) = drain(&mut reader, 0);
    writer.push(bytes(count, 100)).unwrap();
    assert_eq!((budget.memory_used(), budget.files_used()), (100, 0));
    assert!(!lock(&writer.0).store.has_file());
    assert_eq!((writer.len_written(), writer.len_buffered()), (count + 100, 100));
}

#[test]
fn a_long_body_does_not_fill_the_disk_while_the_reader_follows() {
    let directory = tempfile::tempdir().unwrap();
    let budget = SpoolBudget::new(0, u64::MAX);
    let (mut writer, mut reader) = spool(&limits(directory.path(), 0, u64::MAX), &budget);
    let (mut read, mut most) = (0, 0);
    while writer.len_written() < 10 * KIB * KIB {
        writer.push(bytes(writer.len_written(), 50 * KIB)).unwrap();
        most = most.max(budget.files_used());
        assert!(budget.files_used() >= writer.len_buffered());
        while writer.len_buffered() > 300 * KIB {
            let Poll::Ready(Some(Ok(data))) = reader.poll_data(&context()) else { panic!("there is more") };
            read += data.len() as u64;
        }
    }
    assert!(most < 1500 * KIB, "{most} bytes of disk space");
    let total = writer.len_written();
    writer.finish(None);
    assert_eq!(reader.size_hint().exact(), Some(total - read));
    assert!(matches!(drain(&mut reader, read), (_, Poll::Ready(None))));
}

#[test]
fn the_reader_receives_the_bytes_before_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let budget = SpoolBudget::new(KIB * KIB, KIB * KIB);
    let start = || {
        let (mut writer, reader) = spool(&limits(directory.path(), KIB, 500 * KIB), &budget);
        (0..100).for_each(|number| writer.push(bytes(number * 100, 100)).unwrap());
        (writer, reader)
    };
    let (writer, mut reader) = start();
    drop(writer);
    assert!(matches!(drain(&mut reader, 0), (10_000, Poll::Ready(Some(SpoolError::BrokenOff)))));
    assert!(matches!(drain(&mut reader, 0), (0, Poll::Ready(Some(SpoolError::BrokenOff)))), "the end stays");
    assert!(!reader.is_end_stream() && reader.size_hint().exact().is_none());

    let (writer, mut reader) = start();
    writer.abort(SpoolError::TooLong { limit: 5 });
    assert!(matches!(drain(&mut reader, 0), (10_000, Poll::Ready(Some(SpoolError::TooLong { limit: 5 })))));

    let (writer, mut reader) = start();
    writer.finish(None);
    assert!(matches!(drain(&mut reader, 0), (10_000, Poll::Ready(None))));
    assert!(reader.is_end_stream());
}

#[test]
fn without_a_reader_everything_is_discarded() {
    let directory = tempfile::tempdir().unwrap();
    let budget = SpoolBudget::new(KIB * KIB, KIB * KIB);
    let (mut writer, mut reader) = spool(&limits(directory.path(), KIB, 10 * KIB), &budget);
    push_until_full(&mut writer, 700);
    assert!(budget.memory_used() > 0 && budget.files_used() > 0);
    assert!(reader.poll_data(&context()).is_ready());
    push_until_full(&mut writer, 700);
    drop(reader);
    assert_eq!((budget.memory_used(), budget.files_used()), (0, 0));
    assert!(writer.is_abandoned() && !writer.is_full() && writer.poll_ready(&context()).is_ready());
    writer.push(bytes(0, 100 * KIB)).unwrap();
    assert_eq!((budget.memory_used(), budget.files_used(), writer.len_buffered()), (0, 0, 0));
}

#[test]
fn a_full_spool_names_the_reason_and_refuses_to_lose_bytes_silently() {
    let directory = tempfile::tempdir().unwrap();
    type Reason = fn(&SpoolError) -> bool;
    let cases: [(u64, u64, u64, Reason); 3] = [
        (u64::MAX, 0, u64::MAX, |error| matches!(error, SpoolError::Unread { limit: KIB })),
        (u64::MAX, 5000, u64::MAX, |error| matches!(error, SpoolError::TooLong { limit: 5000 })),
        (0, u64::MAX, 6000, |error| matches!(error, SpoolError::FilesUsedUp { limit: 6000 })),
    ];
    for (memory, file_each, files, reason) in cases {
        let budget = SpoolBudget::new(memory, files);
        let (mut writer, mut reader) = spool(&limits(directory.path(), KIB, file_each), &budget);
        push_until_full(&mut writer, 300);
        assert!(writer.why_full().is_some_and(|error| reason(&error)), "{:?}", writer.why_full());
        let written = writer.len_written();
        assert!(writer.push(bytes(written, 1)).is_err_and(|error| reason(&error)));
        assert!(writer.push(bytes(written + 1, 1)).is_err(), "the body stays failed");
        writer.finish(None);
        let (count, end) = drain(&mut reader, 0);
        assert_eq!(count, written);
        assert!(matches!(&end, Poll::Ready(Some(error)) if reason(error)), "{end:?}");
    }
}

#[test]
fn an_empty_spool_accepts_a_chunk_even_if_nothing_is_left_for_it() {
    let budget = SpoolBudget::new(0, 0);
    for file_each in [0, KIB] {
        let (mut writer, mut reader) = spool(&limits(Path::new("/nonexistent"), 0, file_each), &budget);
        for number in 0..3 {
            assert!(writer.poll_ready(&context()).is_ready());
            writer.push(bytes(number * 100, 100)).unwrap();
            assert!(writer.is_full() && budget.memory_used() == 100);
            assert_eq!(drain(&mut reader, number * 100).0, 100);
        }
    }
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Relaxed);
    }
}

/// Polls with a waker of its own, which must be used by `act` and not before.
#[track_caller]
fn assert_woken_by(poll: impl FnOnce(&Context<'_>) -> bool, act: impl FnOnce()) {
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    assert!(poll(&Context::from_waker(&waker)) && !woken.0.load(Relaxed));
    act();
    assert!(woken.0.load(Relaxed));
}

#[test]
fn each_end_wakes_the_other() {
    let budget = SpoolBudget::new(KIB * KIB, 0);
    let start = || spool(&limits(Path::new("/nonexistent"), KIB, 0), &budget);
    let (mut writer, mut reader) = start();
    assert_woken_by(|context| reader.poll_data(context).is_pending(), || writer.push(bytes(0, 10)).unwrap());
    push_until_full(&mut writer, 512);
    let read = |reader: &mut SpoolReader| assert!(reader.poll_data(&context()).is_ready());
    assert_woken_by(|context| writer.poll_ready(context).is_pending(), || read(&mut reader));
    push_until_full(&mut writer, 512);
    assert_woken_by(|context| writer.poll_ready(context).is_pending(), || drop(reader));

    let (mut writer, reader) = start();
    assert_woken_by(|context| writer.poll_abandoned(context).is_pending(), || drop(reader));
    let (writer, mut reader) = start();
    assert_woken_by(|context| reader.poll_data(context).is_pending(), || writer.finish(None));
    let (writer, mut reader) = start();
    assert_woken_by(|context| reader.poll_data(context).is_pending(), || drop(writer));
}

#[tokio::test(flavor = "current_thread")]
async fn trailers_follow_the_body_and_its_length_is_unknown_until_then() {
    let directory = tempfile::tempdir().unwrap();
    let budget = SpoolBudget::new(1 << 20, 1 << 20);
    let (mut writer, mut reader) = spool(&limits(directory.path(), KIB, 0), &budget);
    writer.push(Bytes::from("body")).unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", http::HeaderValue::from_static("1"));
    writer.finish(Some(trailers.clone()));
    assert!(!reader.is_end_stream() && reader.size_hint().exact().is_none());
    assert_eq!(reader.frame().await.unwrap().unwrap().into_data().unwrap(), "body");
    assert!(!reader.is_end_stream());
    assert_eq!(reader.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
    assert!(reader.is_end_stream() && reader.frame().await.is_none());
}

#[tokio::test(flavor = "current_thread")]
async fn the_reader_is_woken_by_a_push_an_end_and_a_break() {
    let directory = tempfile::tempdir().unwrap();
    let budget = SpoolBudget::new(KIB * KIB, KIB * KIB);
    for is_whole in [true, false] {
        let (mut writer, mut reader) = spool(&limits(directory.path(), KIB, KIB), &budget);
        let reading = async {
            let read = reader.frame().await.unwrap().unwrap().into_data().unwrap();
            (read, reader.frame().await.map(|end| end.is_ok()))
        };
        let writing = async {
            tokio::task::yield_now().await;
            writer.push(Bytes::from_static(b"text")).unwrap();
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            if is_whole { writer.finish(None) } else { drop(writer) }
        };
        let (read, ()) = tokio::join!(reading, writing);
        assert_eq!(read, (Bytes::from_static(b"text"), if is_whole { None } else { Some(false) }));
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_streaming_writer_waits_for_its_reader_in_bounded_memory() {
    let directory = tempfile::tempdir().unwrap();
    let budget = SpoolBudget::new(KIB * KIB, KIB * KIB);
    let limits = limits(directory.path(), 10 * KIB, 500 * KIB).streaming();
    let (mut writer, mut reader) = spool(&limits, &budget);
    let writing = async {
        while writer.len_written() < 1000 * KIB {
            poll_fn(|context| writer.poll_ready(context)).await;
            assert!(writer.len_buffered() < 10 * KIB);
            writer.push(bytes(writer.len_written(), 3 * KIB)).unwrap();
        }
        writer.finish(None);
    };
    let reading = async {
        let mut read = 0;
        while let Some(frame) = reader.frame().await {
            let data = frame.unwrap().into_data().unwrap();
            assert!(data == bytes(read, data.len() as u64));
            read += data.len() as u64;
            assert!(budget.memory_used() <= 13 * KIB && budget.files_used() == 0);
            tokio::task::yield_now().await;
        }
        read
    };
    let ((), read) = tokio::join!(writing, reading);
    assert!(read >= 1000 * KIB);
}

#[tokio::test(flavor = "current_thread")]
async fn a_writer_that_waits_is_woken_when_the_reader_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let budget = SpoolBudget::new(KIB * KIB, KIB * KIB);
    let limits = limits(directory.path(), KIB, 0);
    let (mut writer, reader) = spool(&limits, &budget);
    tokio::join!(poll_fn(|context| writer.poll_abandoned(context)), async { drop(reader) });
    let (mut writer, reader) = spool(&limits, &budget);
    push_until_full(&mut writer, 100);
    tokio::join!(poll_fn(|context| writer.poll_ready(context)), async { drop(reader) });
    assert!(writer.is_abandoned());
}

#[test]
fn a_missing_directory_slows_a_spool_down_but_does_not_break_it() {
    let budget = SpoolBudget::new(KIB * KIB, KIB * KIB);
    let (mut writer, mut reader) = spool(&limits(Path::new("/nonexistent/forkyard"), KIB, KIB * KIB), &budget);
    push_until_full(&mut writer, 300);
    assert!(matches!(writer.why_full(), Some(SpoolError::Io(_))), "{:?}", writer.why_full());
    assert!(budget.memory_used() <= KIB + 300 && budget.files_used() == 0);
    let (count, _) = drain(&mut reader, 0);
    assert_eq!(count, writer.len_written());
    assert!(!writer.is_full());
}

/// Set in the process that runs with a file system, or a limit on the size of files, of 64 KiB: the directory to use.
const SMALL: &str = "FORKYARD_TEST_SMALL_DIRECTORY";
const SMALL_SIZE: u64 = 64 * KIB;

/// The limit works without privileges. The shell ignores SIGXFSZ, so that a write fails with EFBIG. The unit is 512 bytes.
const LIMIT: &str = "trap '' XFSZ; ulimit -f 128";
const MOUNT: &str = "mount -t tmpfs -o size=64k tmpfs \"$1\"";

/// Runs `test` of this binary after `setup` in a shell, which `before` may wrap in namespaces.
fn run_limited(before: &[&str], setup: &str, test: &str) {
    let directory = tempfile::tempdir().unwrap();
    let script = format!("{setup} && exec \"$0\" --exact {test} --nocapture");
    let (program, arguments) = before.split_first().map_or(("sh", before), |(first, rest)| (*first, rest));
    let mut command = Command::new(program);
    command.args(arguments);
    if !before.is_empty() {
        command.arg("sh");
    }
    command.args(["-c", &script]).arg(std::env::current_exe().unwrap()).arg(directory.path());
    let output = command.env(SMALL, directory.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "after {setup}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs `body` in a process with a limit on the size of files and, if namespaces are available, in one with a full file
/// system.
fn in_small_space(test: &str, body: fn(&Path)) {
    if let Some(directory) = std::env::var_os(SMALL) {
        return body(Path::new(&directory));
    }
    let test = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
    run_limited(&[], LIMIT, &test);
    let namespaces = ["unshare", "--map-root-user", "--mount"];
    let probe = format!("{MOUNT} 2>&1");
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(namespaces[0])
        .args(&namespaces[1..])
        .args(["sh", "-c", &probe, "sh"])
        .arg(directory.path())
        .output();
    match output {
        Ok(output) if output.status.success() => run_limited(&namespaces, MOUNT, &test),
        other => eprintln!("{test}: not run on a full tmpfs, because a user namespace cannot mount one: {other:?}"),
    }
}

#[test]
fn a_full_disk_slows_a_spool_down_and_harms_no_other() {
    in_small_space("a_full_disk_slows_a_spool_down_and_harms_no_other", |directory| {
        let budget = SpoolBudget::new(KIB * KIB, KIB * KIB * KIB);
        let limits = limits(directory, 8 * KIB, KIB * KIB);
        let (mut writer, mut reader) = spool(&limits, &budget);
        push_until_full(&mut writer, 3 * KIB);
        assert!(matches!(writer.why_full(), Some(SpoolError::NoSpace(_))), "{:?}", writer.why_full());
        assert!(budget.files_used() <= SMALL_SIZE && budget.files_used() > SMALL_SIZE / 2);
        assert!(budget.memory_used() <= 11 * KIB);

        let (mut other, mut other_reader) = spool(&limits, &budget);
        let mut read = 0;
        while other.len_written() < 300 * KIB {
            push_until_full(&mut other, 5 * KIB);
            read += drain(&mut other_reader, read).0;
        }
        other.finish(None);
        assert!(matches!(drain(&mut other_reader, read), (0, Poll::Ready(None))));

        let (count, _) = drain(&mut reader, 0);
        assert_eq!(count, writer.len_written());
        assert_eq!((budget.memory_used(), budget.files_used()), (0, 0));
        assert!(!writer.is_full());
        writer.push(bytes(count, 100 * KIB)).unwrap();
        assert!(!lock(&writer.0).store.has_file(), "nothing of the chunk is in the file");
        assert_eq!((drain(&mut reader, count).0, budget.memory_used()), (100 * KIB, 0));
        let count = count + 100 * KIB;
        writer.push(bytes(count, 40 * KIB)).unwrap();
        assert_eq!(budget.files_used(), 40 * KIB, "the disk is used again");
        assert_eq!(drain(&mut reader, count).0, 40 * KIB);
    });
}

#[test]
fn a_full_disk_fails_a_writer_that_does_not_wait_and_a_collection() {
    in_small_space("a_full_disk_fails_a_writer_that_does_not_wait_and_a_collection", |directory| {
        let budget = SpoolBudget::new(KIB * KIB, KIB * KIB * KIB);
        let limits = limits(directory, 8 * KIB, KIB * KIB);
        let (mut writer, mut reader) = spool(&limits, &budget);
        let error = (0..100).find_map(|number| writer.push(bytes(number * 3 * KIB, 3 * KIB)).err()).unwrap();
        assert!(matches!(error, SpoolError::NoSpace(_)), "{error}");
        let (count, end) = drain(&mut reader, 0);
        assert_eq!(count, writer.len_written());
        assert!(count > SMALL_SIZE / 2 && count < SMALL_SIZE + 12 * KIB);
        assert!(matches!(end, Poll::Ready(Some(SpoolError::NoSpace(_)))), "{end:?}");

        let body = http_body_util::Full::new(bytes(0, 100 * KIB));
        let collected = std::pin::pin!(collect(body, &limits, &budget)).poll(&mut context());
        assert!(matches!(collected, Poll::Ready(Err(CollectError::Spool(SpoolError::NoSpace(_))))), "{collected:?}");
        assert_eq!((budget.memory_used(), budget.files_used()), (0, 0));
        let body = http_body_util::Full::new(bytes(0, 30 * KIB));
        let collected = std::pin::pin!(collect(body, &limits, &budget)).poll(&mut context());
        assert!(matches!(collected, Poll::Ready(Ok(spooled)) if spooled.len() == 30 * KIB));
    });
}
