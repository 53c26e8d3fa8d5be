"""Bytes of strangers as text: which names of character encodings count, and decoding in small pieces. Pure.

Only what browsers read is read. The interpreter knows more under a name that a server may send: codecs that are no character
encodings, raise on everything, or take quadratic time.
"""

import codecs
import re

PIECE_BYTES = 16 * 1024
FALLBACK = "cp1252"  # what old pages use and do not say
_BOMS = ((codecs.BOM_UTF8, "utf_8"), (codecs.BOM_UTF16_LE, "utf_16_le"), (codecs.BOM_UTF16_BE, "utf_16_be"))
_PUNCTUATION = re.compile(r"[^a-z0-9]")

# spec: WHATWG Encoding, 4.2, names and labels, without their punctuation. Two of its encodings are none for us: `replacement`
# stands for what must not be decoded, `x-user-defined` for bytes that are no text.
_LABELS = {
    "utf_8": "unicode11utf8 unicode20utf8 utf8 xunicode20utf8",
    "cp866": "866 cp866 csibm866 ibm866",
    "iso8859_2": "csisolatin2 iso88592 isoir101 iso885921987 l2 latin2",
    "iso8859_3": "csisolatin3 iso88593 isoir109 iso885931988 l3 latin3",
    "iso8859_4": "csisolatin4 iso88594 isoir110 iso885941988 l4 latin4",
    "iso8859_5": "csisolatincyrillic cyrillic iso88595 isoir144 iso885951988",
    "iso8859_6": "arabic asmo708 csiso88596e csiso88596i csisolatinarabic ecma114 iso88596 iso88596e iso88596i isoir127 "
    "iso885961987",
    "iso8859_7": "csisolatingreek ecma118 elot928 greek greek8 iso88597 isoir126 iso885971987 suneugreek",
    "iso8859_8": "csiso88598e csiso88598i csisolatinhebrew hebrew iso88598 iso88598e iso88598i isoir138 iso885981988 logical "
    "visual",
    "iso8859_10": "csisolatin6 iso885910 isoir157 l6 latin6",
    "iso8859_13": "iso885913",
    "iso8859_14": "iso885914",
    "iso8859_15": "csisolatin9 iso885915 l9",
    "iso8859_16": "iso885916",
    "koi8_r": "cskoi8r koi koi8 koi8r",
    "koi8_u": "koi8ru koi8u",
    "mac_roman": "csmacintosh mac macintosh xmacroman",
    "mac_cyrillic": "xmaccyrillic xmacukrainian",
    "cp874": "dos874 iso885911 tis620 windows874",
    "cp1250": "cp1250 windows1250 xcp1250",
    "cp1251": "cp1251 windows1251 xcp1251",
    "cp1252": "ansix341968 ascii cp1252 cp819 csisolatin1 ibm819 iso88591 isoir100 iso885911987 l1 latin1 usascii windows1252 "
    "xcp1252",
    "cp1253": "cp1253 windows1253 xcp1253",
    "cp1254": "cp1254 csisolatin5 iso88599 isoir148 iso885991989 l5 latin5 windows1254 xcp1254",
    "cp1255": "cp1255 windows1255 xcp1255",
    "cp1256": "cp1256 windows1256 xcp1256",
    "cp1257": "cp1257 windows1257 xcp1257",
    "cp1258": "cp1258 windows1258 xcp1258",
    "gb18030": "chinese csgb2312 csiso58gb231280 gb18030 gb2312 gb231280 gbk isoir58 xgbk",
    "big5hkscs": "big5 big5hkscs cnbig5 csbig5 xxbig5",
    "euc_jp": "cseucpkdfmtjapanese eucjp xeucjp",
    "iso2022_jp": "csiso2022jp iso2022jp",
    "cp932": "csshiftjis ms932 mskanji shiftjis sjis windows31j xsjis",
    "cp949": "cseuckr csksc56011987 euckr isoir149 korean ksc5601 ksc56011987 ksc56011989 windows949",
    "utf_16_be": "unicodefffe utf16be",
    "utf_16_le": "csunicode iso10646ucs2 ucs2 unicode unicodefeff utf16 utf16le",
}
_CODECS = {label: codec for codec, labels in _LABELS.items() for label in labels.split()}


def codec_of(label: str | None) -> str | None:
    """The codec of a character encoding by the name that a server or page gives it. None for what is none."""
    return _CODECS.get(_PUNCTUATION.sub("", label.lower())) if label is not None else None


def decoded(body: bytes, *labels: str | None) -> str:
    """The body as text: by its byte order mark, the first label that means something, as UTF-8, at last as what old pages use."""
    for mark, codec in _BOMS:
        if body.startswith(mark):
            return _in_pieces(body[len(mark) :], codec)
    for codec in map(codec_of, labels):
        if codec is not None:
            return _in_pieces(body, codec)
    try:
        return codecs.getincrementaldecoder("utf_8")().decode(body)  # a character cut off at the end is no error
    except UnicodeDecodeError:
        return _in_pieces(body, FALLBACK)


def _in_pieces(body: bytes, codec: str) -> str:
    """Each piece takes a decoder milliseconds, which holds the interpreter; between them other threads have their turn."""
    decoder = codecs.getincrementaldecoder(codec)(errors="replace")
    pieces = [decoder.decode(body[at : at + PIECE_BYTES]) for at in range(0, len(body), PIECE_BYTES)]
    return "".join([*pieces, decoder.decode(b"", final=True)])
