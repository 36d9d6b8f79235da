//! The kernel's socket list: whatever datagrams come, it ends, with sockets or an error, and makes
//! up nothing.
//!
//! An input is datagrams, each after its length in two bytes (little endian); what is left of the
//! last one is taken as it is.
#![no_main]

use std::io;

use balancer::sys::sock_diag::{Family, Socket, Storage, parse, read_answer};
use libfuzzer_sys::fuzz_target;

/// The sequence number of the request, which the seeds answer.
const SEQUENCE: u32 = 1;
/// The least bytes of a message about a socket: `struct nlmsghdr` and `struct inet_diag_msg`.
const LEAST: usize = 16 + 72;

fuzz_target!(|input: &[u8]| {
    let datagrams = datagrams(input);
    let whole = read(&datagrams);
    for datagram in &datagrams {
        alone(datagram);
    }
    // The same again: nothing is left over from an answer.
    let again = read(&datagrams);
    assert_eq!(whole.1, again.1);
    assert_eq!(
        whole.0.map_err(|error| error.to_string()),
        again.0.map_err(|error| error.to_string())
    );
});

fn datagrams(mut input: &[u8]) -> Vec<&[u8]> {
    let mut datagrams = Vec::new();
    while let Some((length, rest)) = input.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (datagram, rest) = rest.split_at(length);
        datagrams.push(datagram);
        input = rest;
    }
    datagrams
}

/// As from the kernel, which falls silent after the last datagram.
fn read(datagrams: &[&[u8]]) -> (io::Result<bool>, Vec<Socket>) {
    let mut left = datagrams.iter();
    let mut sockets = Vec::new();
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let result = read_answer(SEQUENCE, usize::MAX, &mut sockets, &mut buffer, |buffer| {
        let datagram = left.next().ok_or(io::ErrorKind::TimedOut)?;
        buffer[..datagram.len()].copy_from_slice(datagram);
        Ok(Some(datagram.len()))
    });
    are_in(
        &sockets,
        datagrams.iter().map(|datagram| datagram.len()).sum(),
    );
    (result, sockets)
}

fn alone(datagram: &[u8]) {
    let mut sockets = Vec::new();
    match parse(datagram, SEQUENCE, &mut sockets) {
        Ok(progress) => assert!(progress.end.is_none_or(|error| error >= 0)),
        Err(malformed) => assert!(!malformed.to_string().is_empty()),
    }
    are_in(&sockets, datagram.len());
}

/// No more sockets, and no more storage in them, than so many bytes can tell of.
fn are_in(sockets: &[Socket], bytes: usize) {
    let stored: usize = sockets
        .iter()
        .filter_map(|socket| socket.storage.as_ref())
        .map(Storage::len)
        .sum();
    assert!(sockets.len() * LEAST + stored <= bytes);
    for socket in sockets {
        let ipv6 = socket.family == Family::V6;
        assert!(socket.local.is_ipv6() == ipv6 && socket.remote.is_ipv6() == ipv6);
    }
}
