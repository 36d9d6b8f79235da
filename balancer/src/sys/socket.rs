//! Socket options that no safe crate knows.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
};

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
    Ok(rustix::net::sockopt::socket_cookie(socket)?)
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
