//! Socket options that no safe crate knows.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use balancer_common::abi::Keepalive;
use rustix::net::sockopt;

/// `SO_NETNS_COOKIE` (include/uapi/asm-generic/socket.h), since Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;
/// include/uapi/linux/sockios.h
const SIOCGSKNS: libc::c_ulong = 0x894c;

/// The number that the kernel gives to no other socket until it reboots: `bpf_get_socket_cookie`,
/// and the cookie in `sock_diag`.
///
/// # Errors
/// `ENOTSOCK` where the file is no socket.
pub fn cookie(socket: impl AsFd) -> io::Result<u64> {
    Ok(sockopt::socket_cookie(socket)?)
}

/// The cookie of the netns that a socket is in: a number that the kernel never gives twice until it
/// reboots, and that BPF programs get from `bpf_get_netns_cookie`.
///
/// # Errors
/// `ENOTSOCK` where the file is no socket; `ENOPROTOOPT` where the kernel is older than 5.14.
pub fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes, the size of `cookie`, to the first pointer
    // and a socklen_t to the second. Both live until the call returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The values of a socket's keepalive (`tcp(7)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepaliveOptions {
    /// `TCP_KEEPIDLE`, in seconds.
    pub idle: u32,
    /// `TCP_KEEPINTVL`, in seconds.
    pub interval: u32,
    /// `TCP_KEEPCNT`.
    pub probes: u32,
    /// `TCP_USER_TIMEOUT`, in ms; 0: none.
    pub user_timeout_ms: u32,
}

/// Turns keepalive on for a connection. What differs from `defaults`, the settings of its netns, is
/// its server's choice and stays.
///
/// # Errors
/// Those of `getsockopt(2)` and `setsockopt(2)`: it is no TCP socket.
pub fn turn_keepalive_on(
    socket: impl AsFd,
    keepalive: Keepalive,
    defaults: &KeepaliveOptions,
) -> io::Result<()> {
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    let socket = socket.as_fd();
    if sockopt::tcp_keepidle(socket)? == seconds(defaults.idle) {
        sockopt::set_tcp_keepidle(socket, seconds(keepalive.idle.into()))?;
    }
    if sockopt::tcp_keepintvl(socket)? == seconds(defaults.interval) {
        sockopt::set_tcp_keepintvl(socket, seconds(keepalive.interval.into()))?;
    }
    if sockopt::tcp_keepcnt(socket)? == defaults.probes {
        sockopt::set_tcp_keepcnt(socket, keepalive.probes.into())?;
    }
    let user_timeout = keepalive.user_timeout_ms();
    if user_timeout != 0 && sockopt::tcp_user_timeout(socket)? == defaults.user_timeout_ms {
        sockopt::set_tcp_user_timeout(socket, user_timeout)?;
    }
    Ok(sockopt::set_socket_keepalive(socket, true)?)
}

/// The netns that a socket is in (`SIOCGSKNS`, net/socket.c).
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`; `ENOTTY` where the file is no socket.
pub fn netns(socket: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: this request takes no argument and no pointer.
    let fd = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCGSKNS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a TCP connection has done lately (`struct tcp_info`, `include/uapi/linux/tcp.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// It is in the state ESTABLISHED.
    pub established: bool,
    /// How long ago data was sent last, in milliseconds.
    pub sent_ms_ago: u32,
    /// How long ago data was received last, in milliseconds.
    pub received_ms_ago: u32,
    /// Bytes that wait to be sent for the first time.
    pub unsent: u32,
    /// Bytes that the process has not read yet.
    pub unread: u64,
}

/// Reads what a TCP connection has done lately.
///
/// # Errors
/// `EOPNOTSUPP` where it is no TCP socket; `InvalidData` where the kernel tells less.
pub fn traffic(socket: impl AsFd) -> io::Result<Traffic> {
    const LAST_SENT: usize = 44;
    const LAST_RECEIVED: usize = 52;
    const UNSENT: usize = 144;
    const ESTABLISHED: u8 = 1;
    let mut info = [0_u8; 256];
    let mut length = libc::socklen_t::try_from(info.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes, the size of `info`, to the first pointer
    // and a socklen_t to the second. Both live until the call returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let word = |at: usize| {
        let bytes = info.get(at..at + 4).filter(|_| at + 4 <= length as usize);
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes
            .map(u32::from_ne_bytes)
            .ok_or(io::ErrorKind::InvalidData)
    };
    Ok(Traffic {
        established: info[0] == ESTABLISHED,
        sent_ms_ago: word(LAST_SENT)?,
        received_ms_ago: word(LAST_RECEIVED)?,
        unsent: word(UNSENT)?,
        unread: rustix::io::ioctl_fionread(socket)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn a_socket_keeps_its_cookie_and_no_other_has_it() {
        let [first, second] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").expect("bind"));
        let seen = cookie(&first).expect("cookie");
        assert_eq!(
            cookie(first.try_clone().expect("clone")).expect("cookie"),
            seen
        );
        assert_ne!(cookie(&second).expect("cookie"), seen);
        let file = std::fs::File::open("/dev/null").expect("open");
        assert_eq!(
            cookie(file).expect_err("no socket").raw_os_error(),
            Some(libc::ENOTSOCK)
        );
    }
}
