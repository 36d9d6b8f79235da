//! The events of the kernel half: whatever is in a record of the ring, it is an event with just
//! these fields or none, and one line of the log tells of it.
//!
//! An input is one record (native byte order).
#![no_main]

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard};

use balancer::fuzzing::{log_event, parse_event};
use balancer_common::abi::Event;
use bytes::BufMut as _;
use libfuzzer_sys::fuzz_target;

/// The longest line about an event, in bytes: it has an address, some numbers and a sentence.
const LONGEST_LINE: usize = 500;

fuzz_target!(|record: &[u8]| {
    let Some(event) = parse_event(record) else {
        assert!(record.len() < size_of::<Event>());
        return;
    };
    assert_eq!(written(&event), record[..size_of::<Event>()]);
    let line = line(&event);
    assert!(line.len() <= LONGEST_LINE, "{line}");
    let text = line.strip_suffix('\n').expect("a whole line");
    assert!(
        !text.is_empty() && !text.contains(char::is_control),
        "{line:?}"
    );
    assert!(
        text.contains("agents: ") || text.contains("unknown kind"),
        "{text}"
    );
});

/// The record that an event was read from, written without the reader's help.
fn written(event: &Event) -> Vec<u8> {
    let mut record = Vec::new();
    record.put_u16_ne(event.kind);
    record.put_u16_ne(event.service);
    record.put_u32_ne(event.slot);
    record.put_u64_ne(event.netns);
    event
        .address
        .0
        .iter()
        .for_each(|word| record.put_u32_ne(*word));
    record.put_u16_ne(event.port);
    record.put_u16_ne(event.zero);
    record.put_u32_ne(event.pid);
    record.put_u32_ne(event.tid);
    record.put_u32_ne(event.zeros);
    record
}

/// What the log says of it, without time and place.
fn line(event: &Event) -> String {
    let written = Arc::new(Mutex::new(Vec::new()));
    let sink = Sink(Arc::clone(&written));
    let log = tracing_subscriber::fmt()
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .with_writer(move || sink.clone())
        .finish();
    tracing::subscriber::with_default(log, || log_event(event, "agents"));
    String::from_utf8(lock(&written).clone()).expect("the log is UTF-8")
}

/// Where the log is written to.
#[derive(Clone)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn lock(bytes: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    bytes.lock().expect("nobody panics with it")
}
