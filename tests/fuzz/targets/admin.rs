//! The admin API, from both sides: whatever a client sends, it is a request or gets a refusal;
//! whatever a daemon says, it is an answer or an error.
#![no_main]

use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use balancer::api::{MAX_REQUEST_BYTES, Request, Response};
use balancer::fuzzing::{encode_request, parse_request, read_line, read_response};
use libfuzzer_sys::fuzz_target;

/// The state directory of the daemon that is asked.
const STATE: &str = "/sys/fs/bpf/balancer";
/// The longest refusal, in bytes. An answer must fit into a socket's buffer, whatever the request
/// was.
const LONGEST_REFUSAL: usize = 4096;

fuzz_target!(|bytes: &[u8]| {
    match asked(bytes) {
        Ok(request) => arrives_when_asked(&request),
        Err(refusal) => arrives_when_answered(refusal),
    }
    match read_response(bytes) {
        Ok(response) => assert_eq!(heard(&response), response),
        Err(error) => assert!(!format!("{error:#}").is_empty()),
    }
});

/// What the daemon makes of a client that sends these bytes and no more.
fn asked(bytes: &[u8]) -> Result<Request, String> {
    let line = now(read_line(bytes))?;
    assert!(line.len() <= MAX_REQUEST_BYTES && bytes.starts_with(&line));
    parse_request(&line, Path::new(STATE))
}

fn arrives_when_asked(request: &Request) {
    let sent = encode_request(Path::new(STATE), request).expect("a request can be written");
    assert_eq!(asked(&sent).as_ref(), Ok(request));
    // Whatever follows the line is not looked at, and a daemon with another state does nothing.
    assert_eq!(asked(&[&sent[..], b"{"].concat()).as_ref(), Ok(request));
    assert!(parse_request(&sent, Path::new("/another")).is_err());
}

fn arrives_when_answered(refusal: String) {
    assert!(refusal.len() <= LONGEST_REFUSAL, "{refusal}");
    assert!(!refusal.contains(char::is_control), "{refusal:?}");
    let response = Response::Failed { message: refusal };
    assert_eq!(heard(&response), response);
}

/// The response as a client hears it when a daemon says it.
fn heard(response: &Response) -> Response {
    let mut line = serde_json::to_vec(response).expect("a response can be written");
    line.push(b'\n');
    read_response(&line[..]).expect("a response can be read")
}

/// Bytes in memory are always ready.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits for bytes that are there"),
    }
}
