//! The little HTTP that is needed: one exchange a connection, bodies of a length that is told beforehand.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

const CONNECTS_WITHIN: Duration = Duration::from_secs(2);
const ANSWERS_WITHIN: Duration = Duration::from_secs(15);

/// The body of the answer to a GET.
///
/// # Errors
/// When the server does not answer 200.
pub fn get(server: SocketAddr, path: &str) -> Result<String> {
    exchange(
        server,
        &format!("GET {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\n\r\n"),
    )
}

/// The body of the answer to a POST of JSON.
///
/// # Errors
/// When the server does not answer 200.
pub fn post_json(server: SocketAddr, path: &str, body: &str) -> Result<String> {
    let length = body.len();
    exchange(
        server,
        &format!(
            "POST {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        ),
    )
}

fn exchange(server: SocketAddr, request: &str) -> Result<String> {
    let (head, body) =
        transfer(server, request).with_context(|| format!("{server} does not answer HTTP"))?;
    ensure!(
        head.split(' ').nth(1) == Some("200"),
        "{server} answers {head:?}: {body}"
    );
    Ok(body)
}

/// Sends the request; returns the head and the body of the answer.
fn transfer(server: SocketAddr, request: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect_timeout(&server, CONNECTS_WITHIN)?;
    stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        ensure!(answer.read_line(&mut head)? > 0, "it ends after {head:?}");
    }
    let mut body = vec![0; content_length(&head)?];
    answer.read_exact(&mut body)?;
    Ok((head, String::from_utf8(body)?))
}

fn content_length(head: &str) -> Result<usize> {
    let mut headers = head.lines().filter_map(|line| line.split_once(':'));
    let length = headers.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let (_, length) = length.with_context(|| format!("no content-length in {head:?}"))?;
    Ok(length.trim().parse()?)
}
