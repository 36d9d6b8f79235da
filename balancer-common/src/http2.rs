//! Frames of HTTP/2 (RFC 9113), as far as the kernel half must know them to put a GOAWAY between
//! two of them.

/// Bytes of a frame's header (RFC 9113, section 4.1).
pub const HEADER: usize = 9;

/// A GOAWAY with `NO_ERROR` that takes every stream that the client has opened or is opening (RFC
/// 9113, section 6.8): the client ends its calls there and makes the next one on a new connection.
pub const GOAWAY: [u8; 17] = [
    0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0,
];

// Types of frames (RFC 9113, section 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY_FRAME: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY_FLAG: u8 = 0x20;

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header(pub [u8; HEADER]);

impl Header {
    /// Bytes of the frame with its header.
    #[inline(always)]
    pub const fn frame_bytes(self) -> u32 {
        let bytes = &self.0;
        HEADER as u32 + ((bytes[0] as u32) << 16 | (bytes[1] as u32) << 8 | bytes[2] as u32)
    }

    /// Whether a server sends such a frame; `first`: no other frame of the message is before it.
    ///
    /// Stricter than the protocol: what a frame's payload may look like by chance must not be taken
    /// for one. "Any chain of frames" took every other message of a server that sends zeros for
    /// one. Unknown types, `PRIORITY` and `PUSH_PROMISE` are not believed.
    #[inline(always)]
    pub const fn is_servers(self, first: bool) -> bool {
        let [_, _, _, kind, flags, s0, s1, s2, s3] = self.0;
        let length = self.frame_bytes() - HEADER as u32;
        let stream = u32::from_be_bytes([s0, s1, s2, s3]);
        if s0 & 0x80 != 0 {
            return false;
        }
        // A client's streams are odd; a server that pushes none has no others.
        let clients = stream & 1 == 1;
        let whole = stream == 0;
        match kind {
            DATA => clients && only(flags, END_STREAM | PADDED),
            HEADERS => clients && only(flags, END_STREAM | END_HEADERS | PADDED | PRIORITY_FLAG),
            RST_STREAM => clients && length == 4 && flags == 0,
            // Six bytes for each setting; an acknowledgement has none.
            SETTINGS => whole && only(flags, ACK) && length <= 240 && (flags == 0 || length == 0),
            PING => whole && only(flags, ACK) && length == 8,
            GOAWAY_FRAME => whole && flags == 0 && length >= 8,
            WINDOW_UPDATE => (clients || whole) && flags == 0 && length == 4,
            CONTINUATION => clients && !first && only(flags, END_HEADERS),
            _ => false,
        }
    }
}

/// No other bit is set.
#[inline(always)]
const fn only(flags: u8, allowed: u8) -> bool {
    flags & !allowed == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(length: u32, kind: u8, flags: u8, stream: u32) -> Header {
        let [_, l0, l1, l2] = length.to_be_bytes();
        let [s0, s1, s2, s3] = stream.to_be_bytes();
        Header([l0, l1, l2, kind, flags, s0, s1, s2, s3])
    }

    #[test]
    fn what_servers_send_is_believed() {
        for (length, kind, flags, stream) in [
            (18, SETTINGS, 0, 0),
            (0, SETTINGS, ACK, 0),
            (120, HEADERS, END_HEADERS, 1),
            (5, DATA, 0, 1),
            (1 << 20, DATA, END_STREAM, 7),
            (4, WINDOW_UPDATE, 0, 0),
            (4, WINDOW_UPDATE, 0, 3),
            (4, RST_STREAM, 0, 9),
            (8, PING, ACK, 0),
            (8, GOAWAY_FRAME, 0, 0),
        ] {
            let header = header(length, kind, flags, stream);
            assert!(header.is_servers(true), "{header:?}");
            assert_eq!(header.frame_bytes(), length + 9);
        }
        assert!(header(10, CONTINUATION, END_HEADERS, 1).is_servers(false));
        assert!(!header(10, CONTINUATION, END_HEADERS, 1).is_servers(true));
    }

    #[test]
    fn what_payload_looks_like_is_not() {
        let texts: [&[u8; 9]; 4] = [&[0; 9], b"HTTP/1.1 ", b"+PONG\r\n+P", &[0xff; 9]];
        for bytes in texts {
            assert!(!Header(*bytes).is_servers(true), "{bytes:?}");
        }
        // A TLS record, and a gRPC message of zeros with its five bytes of prefix.
        assert!(!Header([22, 3, 3, 0, 122, 2, 0, 0, 118]).is_servers(true));
        assert!(!Header([0, 0, 0, 0, 64, 0, 0, 0, 0]).is_servers(true));
    }

    #[test]
    fn the_goaway_is_a_frame_that_ends_no_stream() {
        let mut bytes = [0; HEADER];
        bytes.copy_from_slice(&GOAWAY[..HEADER]);
        let header = Header(bytes);
        assert!(header.is_servers(true));
        assert_eq!(header.frame_bytes() as usize, GOAWAY.len());
        assert_eq!(GOAWAY[9..], [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    }

    proptest! {
        /// Of random bytes one in some thousands looks like a header.
        #[test]
        fn a_header_of_another_kind_is_not_believed(bytes: [u8; HEADER], first: bool) {
            if Header(bytes).is_servers(first) {
                prop_assert!(bytes[3] <= CONTINUATION && bytes[3] != 2 && bytes[3] != 5);
                prop_assert_eq!(bytes[5] & 0x80, 0);
            }
        }
    }
}
